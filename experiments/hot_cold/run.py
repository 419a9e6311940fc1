"""Lever 2, hot and cold experts: how fast does a model decode with a part of its experts resident?

    python experiments/hot_cold/run.py [--out DIR] [--quick] [--seed N] [--model DIR]

A model trained on code, prose and tables (model.py) reads held-out text token by token. Its experts
are on disk, and a budget of them is in memory. README.md beside this file says what is compared,
how, and what came out. The control of bfloat16 experts is `--dtype float32`, that of the locality
loss `--locality 0`.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from experiments.hot_cold import training_capacity
from experiments.hot_cold.model import LOCALITY, held_out_bits, model_config, trained_model
from experiments.hot_cold.plots import draw_speed, draw_timelines
from experiments.hot_cold.rounds import fused_seconds, run_rounds, text_windows
from experiments.hot_cold.speeds import Comparison, describe
from experiments.hot_cold.variants import all_variants, open_files
from experiments.hot_cold.verdict import verdict
from moe_jax.base.errors import require
from moe_jax.base.paths import user_path
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config.checks import not_negative
from moe_jax.placement.save_experts import save_experts
from moe_jax.runs.load import Trained
from moe_jax.study.results import publish

QUESTION = "How fast does a model decode with only a part of its experts in memory?"


@dataclass(frozen=True)
class Settings:
    """Decodes with experts in tiers at several budgets."""

    out: str = "runs/hot-cold"
    """Folder for result.json, the experts on disk and the plots."""
    seed: int = 0
    """Seed of the model."""
    quick: bool = False
    """A smaller model, fewer tokens and rounds."""
    locality: float = LOCALITY
    """Weight of the model's locality loss. 0 trains it with DeepSeek-V3's balance alone."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the experts, on disk and in memory. Everything is computed in float32."""
    training: bool = True
    """Also measure training with tiers."""
    model: str = ""
    """Folder of an earlier run (of traces.py, say) whose trained model is used. Unset: `out`."""

    def __post_init__(self) -> None:
        not_negative("", self, "locality")


def write_experts(run: Trained, folder: Path, dtype: str) -> None:
    """The model's experts on disk, thrice: as decoded, in 8 bits, and in float32."""
    parameters = run.state.parameters
    save_experts(folder, parameters, dtype=dtype)
    save_experts(folder / "low-bit", parameters, low_bit=True)
    save_experts(folder / "float32", parameters, dtype="float32")


def main(argv: list[str]) -> None:
    """Trains or loads, decodes, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    corpus = user_path(settings.model) if settings.model else out
    which = (settings.seed, settings.quick, settings.locality)
    require(
        corpus == out or Path(model_config(corpus, *which).out).is_dir(),
        f"--model '{settings.model}' holds no model of these settings (seed, quick, locality): "
        "give the --out of traces.py or run.py, or leave it unset to train one",
    )
    run = trained_model(corpus, *which)
    experts = out / "experts"
    write_experts(run, experts, settings.dtype)
    count = 3 if settings.quick else 24
    windows = text_windows(run, corpus, count)
    with ExitStack() as stack:
        variants = list(all_variants(run, experts, stack))
        rounds = run_rounds(variants, windows, 2 if settings.quick else 7, experts)
        comparison = Comparison(variants, rounds)
        measurements = describe(comparison, settings.seed)
        fused = fused_seconds(run, windows) / float(np.median(comparison.full.seconds))
        measurements += [
            Measurement("all_resident_of_fused_loop", fused, "ratio", "model.generate"),
            Measurement("model_bits_per_byte", held_out_bits(run), "bits/byte"),
        ]
        figures = {"speed": draw_speed(comparison), "timeline": draw_timelines(comparison)}
    if settings.training:
        size = training_capacity.QUICK if settings.quick else training_capacity.FULL
        training = training_capacity.measure(size, settings.seed, out)
        measurements += training.measurements
        figures["training_timeline"] = training.figure
    sentences = verdict(
        {m.name: m.value for m in measurements},
        dtype=settings.dtype,
        locality=settings.locality,
        reads=open_files(experts)[1],
    )
    publish(
        out,
        experiment="hot_cold",
        question=QUESTION,
        settings=settings,
        measurements=measurements,
        verdict=sentences,
        figures=figures,
    )


if __name__ == "__main__":
    program(main)
