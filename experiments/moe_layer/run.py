"""How close is the mixture-of-experts layer to the machine's GEMM, and to other libraries?

    python experiments/moe_layer.py [--out DIR] [--quick] [--seed N]

Every ratio is taken between two calls of the same round (moe_cases.paired_rounds) in one process:
the layer with its router, routing and plan, forward and forward with backward, beside a batched
GEMM of the experts' sizes, jax.lax.ragged_dot, and transformers' sparse block on torch (extra
`parity`). After a call torch's OpenMP threads spin for milliseconds and slow down what follows (a
GEMM of 19 ms took 26), while settings against that slow torch itself (OMP_WAIT_POLICY=PASSIVE: 80
ms became 136); so there is a pause before every call, and each library runs as its users have it.

moe_comparison.py: that comparison, saved bytes, and the parts. moe_scaling.py: growth with T, E and
K, decoding, and the proportions of real models. moe_cases.py and moe_peers.py: what is timed.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from experiments.moe_layer.cases import Shape, Table, Times, show
from experiments.moe_layer.comparison import (
    ROWS,
    memory_measurements,
    part_shares,
    reference_measurements,
    reference_table,
    reference_times,
)
from experiments.moe_layer.plots import draw_decode, draw_models, draw_rates, draw_scaling
from experiments.moe_layer.scaling import (
    MODELS,
    Decode,
    Point,
    curve_slopes,
    decode,
    decode_measurements,
    model_shape,
    model_table,
    scaling_curve,
)
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, program

QUESTION = (
    "How close is the mixture-of-experts layer to the machine's GEMM, and to other libraries?"
)


@dataclass(frozen=True)
class Settings:
    """Times the mixture-of-experts layer beside its limits and its peers."""

    out: str = "runs/moe-layer"
    """Folder for result.json, metrics.jsonl and plots."""
    seed: int = 0
    """Seed of the inputs, weights and routing."""
    quick: bool = False
    """Smaller shapes, fewer points and fewer rounds."""


@dataclass(frozen=True)
class Scale:
    """How much work a run does."""

    reference: Shape
    gemm: int
    """Side of the plain GEMM."""
    rounds: int
    """Rounds at the reference shape and of decoding."""
    fewer_rounds: int
    """Rounds of the curves and models."""
    base: Shape
    """What the curves vary one size of."""
    curves: dict[str, list[int]]
    decoding: tuple[Shape, ...]
    decoding_tokens: tuple[int, ...]
    megabytes: int
    """Size of the array that measures the reading bandwidth."""
    models: tuple[str, ...]
    model_flops: float
    """At most so many FLOPs in a model's forward pass."""
    model_tokens: int
    """And at most so many tokens."""


FULL = Scale(
    reference=Shape(2048, 512, 256, 64, 6),
    gemm=2048,
    rounds=15,
    fewer_rounds=5,
    base=Shape(2048, 128, 64, 64, 6),
    curves={
        "T": [64 << n for n in range(10)],
        "E": [8 << n for n in range(7)],
        "K": [1, 2, 4, 8, 16],
    },
    decoding=(Shape(1, 512, 256, 64, 6), Shape(1, 512, 256, 256, 8)),
    decoding_tokens=(1, 2, 4, 8, 16),
    megabytes=512,
    models=tuple(MODELS),
    model_flops=4e9,
    model_tokens=4096,
)
QUICK = replace(
    FULL,
    reference=Shape(256, 128, 128, 64, 6),
    gemm=1024,
    rounds=3,
    fewer_rounds=3,
    curves={"T": [64, 1024], "E": [8, 128], "K": [1, 8]},
    decoding=FULL.decoding[:1],
    decoding_tokens=(1, 4, 16),
    megabytes=256,
    models=("OLMoE-1B-7B",),
    model_flops=5e8,
)


QUIET = 1.5
"""gemm_spread beyond which the verdict warns that other work disturbed the measurement."""


def verdict(values: dict[str, Any]) -> str:
    """One sentence from the numbers."""
    peers = "no other library was there to compare with"
    if values["train_over_transformers"]:
        peers = (
            f"it is {values['forward_over_transformers']:.2g}x and "
            f"{values['train_over_transformers']:.2g}x as fast as transformers' best block"
        )
    noise = ""
    if values["gemm_spread"] > QUIET:
        noise = (
            f"; NOT TO BE RELIED ON: the same GEMM took {values['gemm_spread']:.1f} times as long "
            "in some rounds as in others, so other work was running; repeat it alone"
        )
    return (
        f"forward the layer does {values['forward_of_gemm']:.0%} of the batched GEMM's rate, with "
        f"the backward pass {values['train_of_gemm']:.0%} (half of all rows on one expert: "
        f"{values['skewed_forward_of_gemm']:.0%} and {values['skewed_train_of_gemm']:.0%}); "
        f"{peers}; time grows as T^{values['slope_time_T']:.2f}, K^{values['slope_time_K']:.2f}, "
        f"E^{values['slope_time_E']:.2f}; decoding a token takes "
        f"{values['decode_of_all_experts_T1']:.0%} of the time to read all experts{noise}"
    )


@dataclass
class Found:
    """What was measured, as the plots need it."""

    times: Times
    curves: dict[str, list[Point]]
    decoding: list[Decode]
    models: dict[str, dict[str, float | None]]


def measure(scale: Scale, seed: int, table: Table) -> tuple[Found, list[Measurement]]:
    """Everything, section by section; rows go to the table as they are measured."""
    shape = scale.reference
    times, notes = reference_times(shape, scale.gemm, scale.rounds, seed)
    reference_table(times, notes, shape, table)
    measurements = reference_measurements(times, notes, shape)
    measurements += memory_measurements(shape, seed)
    measurements += part_shares(shape, scale.rounds, seed, table)
    curves = {}
    for letter, values in scale.curves.items():
        points = scaling_curve(letter, values, scale.base, scale.fewer_rounds, seed, table)
        measurements += curve_slopes(letter, points, scale.base)
        curves[letter] = points
    decoding = []
    for base in scale.decoding:
        found = decode(base, scale.decoding_tokens, scale.rounds, scale.megabytes, seed, table)
        measurements += decode_measurements(found, f"_E{base.experts}" if decoding else "")
        decoding.append(found)
    shapes = {m: model_shape(m, scale.model_flops, scale.model_tokens) for m in scale.models}
    models, of_models = model_table(shapes, scale.fewer_rounds, seed, table)
    seeded = [replace(m, seeds=[seed]) for m in measurements + of_models]
    return Found(times, curves, decoding, models), seeded


def save_plots(folder: Path, shape: Shape, found: Found) -> None:
    """rates.png, scaling.png, decoding.png, and models.png where models were timed."""
    kinds = ("forward", "train")
    rates = {name: tuple(found.times.rate_of(f"{name} {kind}") for kind in kinds) for name in ROWS}
    figures = {
        "rates": draw_rates(rates, f"mixture-of-experts layer, {shape}"),
        "scaling": draw_scaling(found.curves, "xla, one size varied"),
        "decoding": draw_decode(found.decoding),
    }
    if found.models:
        figures["models"] = draw_models(found.models)
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)


def main(argv: list[str]) -> None:
    """Measures, prints, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    scale = QUICK if settings.quick else FULL
    found, measurements = measure(scale, settings.seed, Table(out / "metrics.jsonl"))
    save_plots(out / "plots", scale.reference, found)
    sentence = verdict({m.name: m.value for m in measurements})
    write_result(
        out,
        experiment="moe_layer",
        question=QUESTION,
        config=settings,
        measurements=measurements,
        verdict=sentence,
    )
    print()
    for m in measurements:
        print(f"{m.name:38} {show(m.value):>10} {m.unit:24} {m.baseline or ''}")
    print(f"\n{sentence}\n{out}/result.json, metrics.jsonl, plots/*.png")


if __name__ == "__main__":
    program(main)
