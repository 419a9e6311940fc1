"""How much of the experts' exchange lies under products in DualPipe's overlapped tick?

    python experiments/pipeline_overlap.py [--out DIR] [--chunks N] [--quick]

No GPU is used, and every time is predicted. XLA compiles a whole training step of a pipeline for
absent H100s: DualPipe over 2 devices, and the experts of a stage over 4 or 8. The scheduled program
has a loop for each kind of step. A forward F, the gradients Bi and W, and the overlapped F&B are
read and priced one by one (moe_jax/predict/scheduled_hlo.py has the model). It needs the packages
triton, jax-triton, jax-cuda13-plugin and jax-cuda13-pjrt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_jax.base.startup import for_absent_gpus

if __name__ == "__main__":
    for_absent_gpus()

import jax
from moe_kernels.launch import lowering_for, missing_package

from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    ExchangeConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    TrainConfig,
    require,
)
from moe_jax.objectives.next_token import next_token
from moe_jax.parallel.exchange import exchanging
from moe_jax.predict.absent import OPTIONS, absent_devices, missing
from moe_jax.predict.hardware import find_card
from moe_jax.predict.scheduled_hlo import Rates, Timeline, timeline
from moe_jax.study.results import publish
from moe_jax.train.engines.pipelined.engine import PipelinedEngine

QUESTION = "How much of the experts' exchange lies under products in DualPipe's overlapped tick?"
NODE = 8
"""H100s of a machine."""
STAGES = 2
MICROBATCHES = 4
"""The fewest that DualPipe takes over two stages."""
APART = ("forward", "backward_input", "backward_weight")
"""The steps that an overlapped one does at once, by their names in the program."""
OVERLAPPED = "overlapped"


@dataclass(frozen=True)
class Settings:
    """Compiles a DualPipe training step for absent H100s, and reads what lies under what."""

    out: str = "runs/pipeline_overlap"
    """Folder for result.json."""
    seed: int = 0
    """Nothing is drawn here, so it changes nothing."""
    chunks: int = 1
    """Parts of a device's experts in the exchange."""
    width: int = 7168
    """Model width (D)."""
    hidden: int = 2048
    """Expert hidden width (F)."""
    own: int = 16
    """Experts of a device in each layer."""
    per_token: int = 8
    """Experts of a token (K)."""
    length: int = 256
    """Tokens of a row."""
    rows: int = 16
    """Rows of a micro-batch on each device."""
    quick: bool = False
    """8 devices alone."""

    def __post_init__(self) -> None:
        require(
            self.own % self.chunks == 0,
            f"chunks={self.chunks} does not divide the {self.own} experts of a device",
        )


def config_of(settings: Settings, devices: int) -> TrainConfig:
    """DeepSeek-V3's blocks, one a stage, with fewer experts, so that the state fits a device."""
    split = devices // STAGES
    moe = MoEConfig(
        experts=settings.own * split,
        experts_per_token=settings.per_token,
        expert_hidden=settings.hidden,
        groups=8,
        groups_per_token=4,
        scale=2.5,
        implementation="triton",
    )
    attention = AttentionConfig(
        kind="mla", heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    )
    model = ModelConfig(
        vocabulary=1024,
        width=settings.width,
        layers=STAGES,
        dense_layers=0,
        attention=attention,
        moe=moe,
        compute_dtype="bfloat16",
    )
    parallel = ParallelConfig(
        pipe=STAGES,
        data=1,
        expert=split,
        schedule="dualpipe",
        microbatches=MICROBATCHES,
        exchange=ExchangeConfig(chunks=settings.chunks),
    )
    return TrainConfig(
        model=model,
        parallel=parallel,
        batch=settings.rows * MICROBATCHES * split,
        data=DataConfig(tokenizer="bytes", length=settings.length),
    )


def compiled(config: TrainConfig) -> Any:
    """The training step, compiled for absent H100s."""
    devices = config.parallel.fixed
    engine = PipelinedEngine(config, absent_devices(find_card("h100"), devices))
    engine.check()
    with jax.set_mesh(engine.mesh), exchanging(config.parallel.exchange), lowering_for(90):
        lowered = engine.lower(engine.abstract_batch(), next_token)
        return lowered.compile(compiler_options=dict(OPTIONS))


@dataclass(frozen=True)
class Reading:
    """The prediction for one kind of step."""

    line: Timeline
    bare: Timeline
    """With products and transfers alone, so that copies cover nothing."""


def read(text: str) -> dict[str, Reading]:
    """The steps of a compiled program by name."""
    return {
        name: Reading(
            timeline(text, Rates(), loop=name),
            timeline(text, Rates(), loop=name, products_alone=True),
        )
        for name in (*APART, OVERLAPPED)
    }


def measurements(readings: Mapping[str, Mapping[str, Reading]]) -> list[Measurement]:
    """What an overlapped step covers and takes, beside its parts one after the other."""
    share = "of the transfers' time, under products, predicted"
    rows = []
    for name, steps in readings.items():
        apart = Timeline()
        bare = Timeline()
        for step in APART:
            apart.add(steps[step].line, 1)
            bare.add(steps[step].bare, 1)
        together = steps[OVERLAPPED]
        rows += [
            Measurement(
                f"{name}.covered_overlapped", together.bare.covered, share, f"{name}.covered_apart"
            ),
            Measurement(f"{name}.covered_apart", bare.covered, share),
            Measurement(
                f"{name}.speedup_overlapped",
                apart.total / together.line.total,
                "x, predicted",
                f"{name}.apart.total",
            ),
        ]
        lines = {step: reading.line for step, reading in steps.items()} | {"apart": apart}
        for step, line in lines.items():
            for part in ("total", "products", "rest", "transfers", "stalled"):
                value = 1e3 * getattr(line, part)
                rows.append(Measurement(f"{name}.{step}.{part}", value, "ms a device, predicted"))
    return rows


def verdict(values: Mapping[str, float | int | None]) -> str:
    """Shares and times, with what they are."""
    sentences = ["Predicted from programs compiled for absent H100, and not measured."]
    for devices in (name.split(".")[0] for name in values if name.endswith(".covered_apart")):
        own = {
            name: values[f"{devices}.{name}"] for name in ("covered_overlapped", "covered_apart")
        }
        sentences.append(
            f"{devices} devices: {own['covered_overlapped']:.0%} of the transfers lie under "
            f"products in F&B, {own['covered_apart']:.0%} in F, Bi and W one after the other. "
            f"F&B waits {values[f'{devices}.overlapped.stalled']:.2f} ms for transfers, the three "
            f"{values[f'{devices}.apart.stalled']:.2f} ms. F&B is "
            f"{values[f'{devices}.speedup_overlapped']:.2f}x as fast."
        )
    return " ".join(sentences)


def main(argv: list[str]) -> None:
    """Compiles, reads, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    problem = missing() or missing_package()
    require(not problem, f"no compiler for absent GPUs: {problem}")
    out = output_folder(settings.out)
    readings = {}
    for devices in (8,) if settings.quick else (8, 16):
        name = str(devices)
        readings[name] = read(compiled(config_of(settings, devices)).as_text())
        for step, reading in readings[name].items():
            print(
                f"{name:>2s} {step:16s} {1e3 * reading.line.total:8.2f} ms predicted, "
                f"{reading.bare.covered:6.1%} of {1e3 * reading.line.transfers:.2f} ms covered",
                flush=True,
            )
    rows = measurements(readings)
    publish(
        out,
        experiment="pipeline_overlap",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict({m.name: m.value for m in rows}),
        figures={},
    )


if __name__ == "__main__":
    program(main)
