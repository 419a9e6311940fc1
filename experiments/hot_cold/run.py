"""Lever 2, hot and cold experts: how fast does a model decode with a part of its experts resident?

    python experiments/lever_hot_cold.py [--out DIR] [--quick] [--seed N] [--model DIR]

A model trained on code, prose and tables (placement_model.py) reads held-out text token by token,
its experts on disk and a budget of them in memory. Reads go around the page cache (O_DIRECT), so
the tier below is the disk itself; the host_… variants have all the others in host memory instead,
and copy them on a miss or compute with them where they are. Every round runs all variants over the
same text, one after the other; ratios are medians over rounds of speeds in the same round. The
naive baseline loads each expert when it is needed, one after the other, and keeps none. The ceiling
is max(compute, bytes · (1 - h) / bandwidth) a token: compute is the all-resident time, h the hit
rate, bandwidth that of the same copies, as many at once, with nothing else running, in the same
round. All variants but low_bit_… give the same bits. The experts are rounded to bfloat16, in which
models are published, those of all_resident too; all_resident_float32 and the divergence from it
show what that costs. Training with tiers is measured by training_capacity.py, which this runs at
the end.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from experiments.hot_cold import training_capacity, variants
from experiments.hot_cold.figures import Figures, describe, draw, verdict
from experiments.hot_cold.model import LOCALITY, held_out_bits, trained_model
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, program
from moe_jax.placement.decode import save_experts

QUESTION = "How fast does a model decode with only a part of its experts in memory?"


@dataclass(frozen=True)
class Settings:
    """Decodes with experts in tiers at several budgets."""

    out: str = "runs/lever-hot-cold"
    """Folder for result.json, the experts on disk and the plots."""
    seed: int = 0
    """Seed of the model."""
    quick: bool = False
    """A smaller model, fewer tokens and rounds."""
    locality: float = LOCALITY
    """Weight of the model's locality loss; 0 trains it with DeepSeek-V3's balance alone."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the experts, on disk and in memory; everything is computed in float32."""
    training: bool = True
    """Measure training with tiers, too."""
    model: str = ""
    """Folder of an earlier run (of traces.py, say) whose trained model is used; unset, `out`."""


def main(argv: list[str]) -> None:
    """Trains or loads, decodes, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    source = Path(settings.model) if settings.model else out
    run = trained_model(source, settings.seed, settings.quick, settings.locality)
    folder, parameters = out / "experts", run.state.parameters
    save_experts(folder, parameters, dtype=settings.dtype)
    save_experts(folder / "low-bit", parameters, low_bit=True)
    save_experts(folder / "float32", parameters, dtype="float32")
    rounds, count = (2, 3) if settings.quick else (7, 24)
    windows = variants.text_windows(run, source, count)
    with ExitStack() as stack:
        compared = list(variants.all_variants(run, folder, stack))
        figures = Figures(compared, *variants.measure(compared, windows, rounds, folder))
        found = describe(figures, settings.seed)
        fused = variants.fused_seconds(run, windows) / float(np.median(figures.full.seconds))
        found += [
            Measurement("all_resident_of_fused_loop", fused, "ratio", "model.generate"),
            Measurement("model_bits_per_byte", held_out_bits(run), "bits/byte"),
        ]
        plots = draw(figures)
    (out / "plots").mkdir(exist_ok=True)
    for name, figure in plots.items():
        figure.savefig(out / "plots" / f"{name}.png", dpi=120)
    if settings.training:
        size = training_capacity.QUICK if settings.quick else training_capacity.FULL
        found += training_capacity.measure(size, settings.seed, out)[0]
    sentence = verdict({m.name: m.value for m in found}, variants.open_files(folder)[1])
    write_result(
        out,
        experiment="lever_hot_cold",
        question=QUESTION,
        config=settings,
        measurements=found,
        verdict=sentence,
    )
    for m in found:
        value = "not yet" if m.value is None else f"{m.value:.4g}"
        print(f"{m.name:42} {value:>12} {m.unit}")
    print(f"\n{sentence}\n{out}/result.json, plots/*.png")


if __name__ == "__main__":
    program(main)
