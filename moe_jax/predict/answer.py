"""From a command line to all that is known of a run on GPUs that are not here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moe_kernels.launch import missing_package

from moe_jax.cli import asks_for_help, parse, parse_settings, split
from moe_jax.config import TrainConfig, require
from moe_jax.config.checks import not_negative, positive
from moe_jax.config.presets import PRESETS
from moe_jax.data.cache import cache_folder
from moe_jax.model.count import train_flops_per_token
from moe_jax.predict.absent import check_target, missing
from moe_jax.predict.hardware import Card, find_card
from moe_jax.predict.lower import Compiled, check_visible, compile_step
from moe_jax.predict.memory import Memory, memory_of
from moe_jax.predict.pipeline import with_ticks
from moe_jax.predict.schedule import Schedule, read_schedule
from moe_jax.predict.step_time import Prediction, predict
from moe_jax.predict.traffic import collective_bytes, total_flops
from moe_jax.train.engines.pipelined.engine import schedule_of


@dataclass(frozen=True)
class PredictSettings:
    """Compiles a run's step for absent GPUs. All options of experiments/train.py are taken, too."""

    hardware: str = "h100"
    """A card of moe_jax/predict/hardware/cards.toml, or a file NAME.toml with its fields."""
    devices: int = 8
    """GPUs of the whole run."""
    price: float = 0.0
    """Price of one GPU for an hour, in a currency of yours. 0: no costs are said."""
    out: str = ""
    """Folder for result.json and the plot. Unset, runs/predict-PRESET-HARDWARE-DEVICES."""
    cache: bool = True
    """Keep compiled programs in the folder of data.cache, by the hash of program and card."""
    quick: bool = False
    """Two layers after the dense ones: the same code on less work."""
    search: bool = False
    """Looks for the fastest layout, micro-batch, schedule and remat that fit. Options of these that
    are given are kept."""
    search_minutes: float = 30.0
    """Time that the search may take. Started again, it goes on where it was."""

    def __post_init__(self) -> None:
        positive("", self, "devices", "search_minutes")
        not_negative("", self, "price")


def read_command(argv: list[str]) -> tuple[PredictSettings, TrainConfig]:
    """The settings of the prediction and those of the run."""
    if asks_for_help(argv):
        parse_settings(PredictSettings(), ["--help"], PredictSettings.__doc__)
    named = argv[:1] if argv and not argv[0].startswith("-") else []
    own, others = split(argv[len(named) :], PredictSettings, TrainConfig)
    settings = parse_settings(PredictSettings(), own)
    config = parse([*named, *others], PRESETS).resolved()
    require(
        config.parallel.fake_devices == 0,
        f"parallel.fake_devices={config.parallel.fake_devices} is for runs on this CPU: use "
        "--devices",
    )
    if settings.quick:
        layers = config.model.dense_layers + 2
        config = replace(config, model=replace(config.model, layers=layers))
    folder = f"runs/predict-{config.preset}-{settings.hardware}-{settings.devices}"
    return replace(settings, out=settings.out or folder.removesuffix(".toml")), config


@dataclass(frozen=True)
class Answer:
    """All that is known of a run on a card."""

    config: TrainConfig
    card: Card
    devices: int
    compiled: Compiled
    memory: Memory
    prediction: Prediction
    flops: int
    """Of products on one device."""
    collectives: Mapping[tuple[str, str], int]

    @property
    def tokens(self) -> int:
        """Of a step on all devices."""
        return self.config.batch * self.config.data.length

    def rate(self, seconds: float) -> float:
        """Tokens a second on one device."""
        return self.tokens / seconds / self.devices

    def mfu(self, seconds: float) -> float:
        """Model FLOP/s over the card's data sheet."""
        flops = train_flops_per_token(self.config.model, self.config.data.length)
        return flops * self.rate(seconds) / self.card.peak_flops

    def gpu_hours(self, seconds: float) -> float:
        """Of all GPUs for a trillion tokens."""
        return 1e12 / self.rate(seconds) / 3600


def check_compiler() -> None:
    """UserError: a package that compiles for absent GPUs is missing."""
    problem = missing() or missing_package()
    require(not problem, f"no compiler for absent GPUs: {problem}")


def answer(settings: PredictSettings, config: TrainConfig) -> Answer:
    """Compiles, or finds the program in the cache, and reads it.

    UserError: unknown hardware, settings that do not go together, or the compiler is missing.
    """
    card = find_card(settings.hardware)
    check_visible(config)
    check_compiler()
    if settings.hardware.endswith(".toml"):
        check_target(card)
    folder = cache_folder(config.data.cache) / "predict" if settings.cache else None
    compiled = compile_step(config, card, settings.devices, folder)
    schedule = schedule_of_step(compiled, config)
    return Answer(
        config=config,
        card=card,
        devices=settings.devices,
        compiled=compiled,
        memory=memory_of(compiled, card.memory_bytes, settings.devices),
        prediction=predict(schedule, card),
        flops=total_flops(schedule),
        collectives=collective_bytes(schedule, compiled.mesh),
    )


def schedule_of_step(compiled: Compiled, config: TrainConfig) -> Schedule:
    """What a device does in a step, in order. In a pipeline, what its busiest device does."""
    found = read_schedule(compiled.text)
    return with_ticks(found, schedule_of(config.parallel)) if config.parallel.pipe > 1 else found
