"""Does a run fit on N GPUs that are not here, and how fast is it there?

    python experiments/predict.py PRESET --hardware NAME --devices N [--price P] [--FIELD VALUE …]

The very step that experiments/train.py would run is compiled for absent GPUs, on a machine without
one. Memory is the compiler's. Time is PREDICTED from the scheduled program by a model of few terms
(docs/predict.md). All options of train.py are taken. It needs the packages of moe_jax[predict].
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

# Triton's interpreter compiles nothing, and JAX would look for a GPU.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from moe_kernels.launch import missing_package

from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import asks_for_help, parse, parse_settings, program, split
from moe_jax.config import TrainConfig, require
from moe_jax.config.checks import not_negative, positive
from moe_jax.config.presets import PRESETS
from moe_jax.data.cache import cache_folder
from moe_jax.model.count import train_flops_per_token
from moe_jax.predict.absent import check_target, missing
from moe_jax.predict.figures import draw
from moe_jax.predict.hardware import Card, find_card
from moe_jax.predict.lower import Compiled, check_visible, compile_step
from moe_jax.predict.memory import Memory, memory_of
from moe_jax.predict.schedule import read_schedule
from moe_jax.predict.step_time import Prediction, predict
from moe_jax.predict.traffic import collective_bytes, total_flops
from moe_jax.study.results import publish

QUESTION = "Does this run fit on GPUs that are not here, and how fast is it there?"
NOT_SHOWN = (
    "Not in it: cuDNN's workspaces, fragmentation between programs, unequal loads of experts, the "
    "host's overhead, data, checkpoints, and evaluations."
)
GIB = 2**30


@dataclass(frozen=True)
class Settings:
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

    def __post_init__(self) -> None:
        positive("", self, "devices")
        not_negative("", self, "price")


def read(argv: list[str]) -> tuple[Settings, TrainConfig]:
    """The settings of the prediction and those of the run."""
    if asks_for_help(argv):
        parse_settings(Settings(), ["--help"], QUESTION)
    named = argv[:1] if argv and not argv[0].startswith("-") else []
    own, others = split(argv[len(named) :], Settings, TrainConfig)
    settings = parse_settings(Settings(), own)
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


def answer(settings: Settings, config: TrainConfig, card: Card) -> Answer:
    """Compiles, or finds the program in the cache, and reads it."""
    folder = cache_folder(config.data.cache) / "predict" if settings.cache else None
    compiled = compile_step(config, card, settings.devices, folder)
    schedule = read_schedule(compiled.text)
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


def measurements(found: Answer, price: float) -> list[Measurement]:
    """The numbers of result.json."""
    memory = found.memory
    compiled = found.compiled
    line = found.prediction.line
    rows = [
        Measurement("bytes_per_device", memory.total, "bytes, compiled, with stated terms"),
        Measurement("card_bytes", memory.card, "bytes"),
        Measurement("fits", int(memory.fits), "1 or 0"),
    ]
    stated = {"context": memory.context, "nccl": memory.nccl}
    rows += [Measurement(f"memory.{n}", v, "bytes, compiled") for n, v in memory.kinds.items()]
    rows += [Measurement(f"memory.{n}", v, "bytes, a stated term") for n, v in stated.items()]
    rows.append(Measurement("flops_per_device", found.flops, "FLOP a step"))
    sent = sum(found.collectives.values())
    rows.append(Measurement("collective_bytes", sent, "bytes sent a device and step"))
    for (kind, axes), size in sorted(found.collectives.items()):
        rows.append(Measurement(f"collective_bytes.{kind}.{axes}", size, "bytes"))
    rows.append(
        Measurement("collective_covered", line.covered, "of the transfers' time, PREDICTED")
    )
    rows += times(found, price)
    for name in ("products", "rest", "transfers", "stalled"):
        rows.append(Measurement(f"step.{name}", getattr(line, name), "s, PREDICTED"))
    for name, (fast, slow) in found.prediction.effects.items():
        changes = [found.prediction.seconds + fast, found.prediction.seconds + slow]
        unit = "s a step over the term's range, PREDICTED"
        rows.append(Measurement(f"term.{name}", found.prediction.seconds, unit, interval=changes))
    rows.append(Measurement("lower_seconds", compiled.lower_seconds, "s"))
    rows.append(Measurement("compile_seconds", compiled.compile_seconds, "s"))
    rows.append(Measurement("host_bytes", compiled.host_bytes, "bytes, of the compiling process"))
    return rows


def times(found: Answer, price: float) -> list[Measurement]:
    """Seconds, rates and costs, each with its interval."""
    low = found.prediction.low
    high = found.prediction.high
    middle = found.prediction.seconds

    def row(name: str, of: Callable[[float], float], unit: str) -> Measurement:
        ends = sorted((of(low), of(high)))
        return Measurement(name, of(middle), f"{unit}, PREDICTED", interval=ends)

    rows = [
        row("step_seconds", float, "s"),
        row("tokens_per_second_per_device", found.rate, "tokens/s"),
        row("mfu", found.mfu, "of the data sheet"),
        row("gpu_hours_per_trillion_tokens", found.gpu_hours, "hours of one GPU"),
    ]
    if price:
        cost = row("cost_per_trillion_tokens", lambda s: price * found.gpu_hours(s), "price units")
        rows.append(cost)
    return rows


def verdict(found: Answer) -> str:
    """Memory, time, and what was left out."""
    memory = found.memory
    prediction = found.prediction
    size = f"{memory.total / GIB:.1f} of {memory.card / GIB:.1f} GiB"
    fits = f"It fits: {size}." if memory.fits else f"It does NOT fit: {size}."
    if memory.fits:
        fits += (
            " JAX reserves 0.75 of a card: set XLA_PYTHON_CLIENT_MEM_FRACTION to at least "
            f"{min(0.99, memory.program / memory.card + 0.01):.2f}."
            if memory.program > 0.75 * memory.card
            else ""
        )
    return (
        f"{fits} PREDICTED, and not measured: {prediction.seconds:.3g} s a step "
        f"({prediction.low:.3g} to {prediction.high:.3g}), "
        f"{found.rate(prediction.seconds):,.0f} tokens/s a device, MFU "
        f"{found.mfu(prediction.seconds):.1%}, {prediction.line.covered:.0%} of the transfers' "
        f"time covered. {NOT_SHOWN}"
    )


def main(argv: list[str]) -> None:
    """Checks, compiles, writes."""
    settings, config = read(argv)
    card = find_card(settings.hardware)
    check_visible(config)
    problem = missing() or missing_package()
    require(not problem, f"no compiler for absent GPUs: {problem}")
    out = output_folder(settings.out)
    if settings.hardware.endswith(".toml"):
        check_target(card)
    found = answer(settings, config, card)
    title = f"{config.preset} on {settings.devices} {card.name}"
    publish(
        out,
        experiment="predict",
        question=QUESTION,
        settings={**asdict(settings), "run": asdict(config)},
        measurements=measurements(found, settings.price),
        verdict=verdict(found),
        figures={"prediction": draw(found.memory, found.prediction, title)},
    )


if __name__ == "__main__":
    program(main)
