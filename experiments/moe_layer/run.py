"""How close is the mixture-of-experts layer to the machine's GEMM, and to other libraries?

    python experiments/moe_layer/run.py [--out DIR] [--quick] [--seed N]

Times the layer with its router, routing and plan, forward and forward with backward. Beside it are
a batched GEMM of the experts' sizes, jax.lax.ragged_dot, and transformers' sparse block on torch
(extra `parity`). README.md beside this file says what is compared, how, and what came out.
"""

from dataclasses import dataclass, replace
from typing import Any

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from matplotlib.figure import Figure

from experiments.moe_layer.comparison import (
    ROWS,
    reference_measurements,
    reference_table,
    reference_times,
)
from experiments.moe_layer.decoding import Decode, decode, decode_measurements
from experiments.moe_layer.memory import memory_measurements
from experiments.moe_layer.models import MODELS, model_shape, model_table
from experiments.moe_layer.parts import part_shares
from experiments.moe_layer.plots import draw_decode, draw_models, draw_rates, draw_scaling
from experiments.moe_layer.scaling import Point, curve_slopes, scaling_curve
from experiments.moe_layer.timing import Times
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.study.layer_case import Shape
from moe_jax.study.live_table import LiveTable
from moe_jax.study.results import publish

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
    """The answer, in sentences."""
    sentences = [
        f"Forward, the layer has {values['forward_of_gemm']:.0%} of the batched GEMM's rate. With "
        f"the backward pass it has {values['train_of_gemm']:.0%}.",
        "With half of all rows on one expert these are "
        f"{values['skewed_forward_of_gemm']:.0%} and {values['skewed_train_of_gemm']:.0%}.",
        "No other library was there to compare with.",
        f"Time grows as T^{values['slope_time_T']:.2f}, K^{values['slope_time_K']:.2f}, "
        f"E^{values['slope_time_E']:.2f}.",
        f"Decoding a token takes {values['decode_of_all_experts_T1']:.0%} of the time to read all "
        "experts.",
    ]
    if values["train_over_transformers"]:
        sentences[2] = (
            f"It is {values['forward_over_transformers']:.2g}x (forward) and "
            f"{values['train_over_transformers']:.2g}x (with the backward pass) as fast as "
            "transformers' best block."
        )
    if values["gemm_spread"] > QUIET:
        sentences.append(
            f"NOT TO BE RELIED ON: the same GEMM took {values['gemm_spread']:.1f} times as long in "
            "some rounds as in others, so other work was running. Repeat it alone."
        )
    return " ".join(sentences)


@dataclass
class Sections:
    """The results of each section, as the plots need them."""

    times: Times
    """At the reference shape."""
    curves: dict[str, list[Point]]
    decoding: list[Decode]
    models: dict[str, dict[str, float | None]]


def measure(scale: Scale, seed: int, table: LiveTable) -> tuple[Sections, list[Measurement]]:
    """Everything, section by section. Rows go to the table as they are measured."""
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
        section = decode(base, scale.decoding_tokens, scale.rounds, scale.megabytes, seed, table)
        # The first shape's names have no suffix: README.md and the verdict name them.
        measurements += decode_measurements(section, f"_E{base.experts}" if decoding else "")
        decoding.append(section)
    shapes = {m: model_shape(m, scale.model_flops, scale.model_tokens) for m in scale.models}
    models, of_models = model_table(shapes, scale.fewer_rounds, seed, table)
    seeded = [replace(m, seeds=[seed]) for m in measurements + of_models]
    return Sections(times, curves, decoding, models), seeded


def draw(shape: Shape, sections: Sections) -> dict[str, Figure]:
    """The plots by name: rates, scaling, decoding, and models where models were timed."""
    kinds = ("forward", "train")
    times = sections.times
    rates = {name: tuple(times.rate_of(f"{name} {kind}") for kind in kinds) for name in ROWS}
    figures = {
        "rates": draw_rates(rates, f"mixture-of-experts layer, {shape}"),
        "scaling": draw_scaling(sections.curves, "xla, one size varied"),
        "decoding": draw_decode(sections.decoding),
    }
    if sections.models:
        figures["models"] = draw_models(sections.models)
    return figures


def main(argv: list[str]) -> None:
    """Measures, prints, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    scale = QUICK if settings.quick else FULL
    sections, measurements = measure(scale, settings.seed, LiveTable(out / "metrics.jsonl"))
    print()
    publish(
        out,
        experiment="moe_layer",
        question=QUESTION,
        settings=settings,
        measurements=measurements,
        verdict=verdict({m.name: m.value for m in measurements}),
        figures=draw(scale.reference, sections),
    )


if __name__ == "__main__":
    program(main)
