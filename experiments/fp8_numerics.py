"""What do FP8 products in the experts cost in loss, and does bfloat16 cost less?

    python experiments/fp8_numerics.py [--out DIR] [--seeds N] [--steps N] [--quick]

Trains the preset `tiny` once for each precision and seed, on the same tokens in the same order from
the same initialisation, and compares held-out bits per byte with float32, seed by seed. Without FP8
units the kernels' arithmetic is emulated (model.moe.precision). So a laptop gives the numerics that
a GPU would have, but not its speed. Runs that are finished are read and not repeated.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import override, parse_settings, program
from moe_jax.config import TrainConfig, require
from moe_jax.config.presets import TINY
from moe_jax.runs.run import run_training
from moe_jax.study.intervals import paired_interval
from moe_jax.study.results import publish, seed_difference

QUESTION = "What do FP8 products in the experts cost in loss?"
BASELINE = "float32"
PRECISIONS: dict[str, dict[str, str]] = {
    BASELINE: {"model.compute_dtype": "float32"},
    "fp8": {"model.compute_dtype": "float32", "model.moe.precision": "fp8"},
    "fp8_power_of_two": {
        "model.compute_dtype": "float32",
        "model.moe.precision": "fp8",
        "model.moe.fp8_scales": "power_of_two",
    },
    "bfloat16": {"model.compute_dtype": "bfloat16"},
}
"""Settings that differ from `tiny`. bfloat16 is the compute dtype of the whole model."""


@dataclass(frozen=True)
class Settings:
    """Trains `tiny` in several precisions and compares held-out losses in pairs."""

    out: str = "runs/fp8_numerics"
    """Folder for result.json and the runs."""
    seed: int = 0
    """The first seed."""
    seeds: int = 5
    """Seeds of each precision, one after the other from `seed`."""
    steps: int = 200
    """Updates of a run."""
    quick: bool = False
    """One seed, 10 steps, float32 and fp8 alone."""

    def __post_init__(self) -> None:
        require(self.seeds > 0, f"seeds is {self.seeds}: it must be positive")


def run_config(settings: Settings, name: str, seed: int) -> TrainConfig:
    """The run of one precision and seed."""
    steps = 10 if settings.quick else settings.steps
    config = override(TINY, PRECISIONS[name])
    out = str(Path(settings.out).expanduser() / f"{name}-{seed}")
    if settings.quick:
        config = override(config, {"data.validation_tokens": "20000", "batch": "4"})
    return replace(config, steps=steps, evaluate_every=steps, samples=0, seed=seed, out=out)


def bits_per_byte(config: TrainConfig) -> float:
    """Held-out loss of a run, trained if it is not there."""
    path = Path(config.out) / "result.json"
    # The folder may hold a run of another length, from a command with another --steps.
    if not path.exists() or json.loads(path.read_text())["config"]["steps"] != config.steps:
        run_training(config)
    found = json.loads(path.read_text())["measurements"]
    return next(m["value"] for m in found if m["name"] == "validation_bits_per_byte")


def measurements(losses: Mapping[str, list[float]], seeds: list[int]) -> list[Measurement]:
    """Mean losses, and mean differences to float32 with their 95% intervals."""
    rows = []
    base = losses[BASELINE]
    unit = "bits/byte"
    for name, values in losses.items():
        mean = statistics.mean(values)
        ratio = mean / statistics.mean(base)
        rows.append(Measurement(f"{name}.loss", mean, unit, BASELINE, ratio, seeds))
        if name == BASELINE:
            continue
        difference = seed_difference(
            f"{name}.difference", values, base, baseline=BASELINE, unit=unit, seeds=seeds
        )
        interval = paired_interval(values, base)
        # One seed has no interval.
        half = None if interval.bounds is None else (interval.high - interval.low) / 2
        rows += [difference, Measurement(f"{name}.difference_95", half, f"+- {unit}")]
    if len(base) > 1:
        rows.append(Measurement("float32.seeds_deviation", statistics.stdev(base), unit))
    return rows


def verdict(values: Mapping[str, float | int | None]) -> str:
    """One sentence."""
    baseline = values[f"{BASELINE}.loss"]
    assert baseline is not None
    parts = []
    for name in PRECISIONS:
        difference = values.get(f"{name}.difference")
        half = values.get(f"{name}.difference_95")
        if difference is not None:
            width = "one seed" if half is None else f"+-{half:.4f}"
            share = difference / baseline
            parts.append(f"{name} {difference:+.4f} bits/byte ({width}, {share:+.2%})")
    return f"Against float32: {', '.join(parts)}."


def main(argv: list[str]) -> None:
    """Trains what is missing, compares, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    seeds = [settings.seed + i for i in range(1 if settings.quick else settings.seeds)]
    names = [BASELINE, "fp8"] if settings.quick else list(PRECISIONS)
    losses = {n: [bits_per_byte(run_config(settings, n, seed)) for seed in seeds] for n in names}
    rows = measurements(losses, seeds)
    publish(
        out,
        experiment="fp8_numerics",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict({m.name: m.value for m in rows}),
        figures={},
    )


if __name__ == "__main__":
    program(main)
