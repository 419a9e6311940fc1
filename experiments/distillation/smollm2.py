"""A teacher that others pre-trained: SmolLM2-135M-Instruct on Python text.

    python experiments/distillation/smollm2.py [--out DIR] [--smollm2-seeds N] [--quick]

trains and compares these students alone. run.py does it after its own arms.

The teacher reads a stretch of Python's standard library once, in its own tokens, into a cache of 12
samples a token. Small mixtures of experts over the same 49,152 tokens are trained on that stretch
from scratch, with the cache and without, from the same start on the same batches. The teacher's
reading is counted. Its pre-training is not: others paid for it, and it may have seen this text.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

import numpy as np
from matplotlib.figure import Figure

from experiments.distillation.arms import Settings
from experiments.distillation.curves import Curves, final, first_below
from experiments.distillation.smollm2_lab import ARMS, BATCH, LENGTH, SmolLM2Lab
from moe_jax.base.errors import UserError
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.distill.upcycle import UpcycleConfig, sparse_config
from moe_jax.interop.gguf import SMOLLM2, find
from moe_jax.model.count import count_parameters, train_flops_per_token
from moe_jax.study.plots import plot_band
from moe_jax.study.results import publish, seed_difference, seed_mean, significance
from moe_jax.train.state import abstract_state, tree_bytes

QUESTION = "What does a published pre-trained teacher give a small mixture of experts?"
UPCYCLED = UpcycleConfig(experts=4, experts_per_token=2)
"""The mixture whose training is predicted and not done: a copy of the teacher with experts."""


def open_lab(settings: Settings, folder: Path) -> SmolLM2Lab | None:
    """None, with a line that says why, where the teacher is not here or not wanted."""
    try:
        find(SMOLLM2)
    except UserError as error:
        print(f"the comparison with SmolLM2 is left out: {error}")
        return None
    if settings.smollm2_seeds == 0:
        print("the comparison with SmolLM2 is left out: --smollm2-seeds is 0")
        return None
    return SmolLM2Lab(settings, folder)


def savings(curves: Curves, lab: SmolLM2Lab) -> tuple[float, float] | None:
    """(tokens, FLOPs) that `ce` needs over those that `kd` needs to reach ce's final loss.

    FLOPs include the teacher's reading of kd's tokens. Medians over seeds. None: not reached.
    """
    update, reading = lab.flops()
    of_seeds = []
    for taught, plain in zip(curves["kd"], curves["ce"], strict=True):
        needed = first_below(taught, plain.bits[-1])
        if needed is None:
            return None
        of_seeds.append(plain.steps[-1] / needed)
    tokens = float(np.median(of_seeds))
    return tokens, tokens * update / (update + reading)


def measurements(curves: Curves, lab: SmolLM2Lab) -> list[Measurement]:
    """What the teacher saves, and what it costs."""
    unit = "bits per byte"
    tokens, flops = savings(curves, lab) or (None, None)
    difference = seed_difference(
        "smollm2.kd_minus_ce_bits",
        final(curves, "kd"),
        final(curves, "ce"),
        baseline="ce",
        unit=unit,
        seeds=lab.seeds,
    )
    counted = "ratio (kd), the teacher's reading too"
    rows = [
        difference,
        Measurement("smollm2.tokens_to_ce_loss_ratio", tokens, "ratio (kd)", "ce"),
        Measurement("smollm2.flops_to_ce_loss_ratio", flops, counted, "ce"),
    ]
    for arm in curves:
        values = final(curves, arm)
        rows.append(seed_mean(f"smollm2.{arm}.bits", values, unit=unit, seeds=lab.seeds))
    return rows + costs(lab)


def costs(lab: SmolLM2Lab) -> list[Measurement]:
    """The teacher's loss and price, and what training all of it as a mixture would take here."""
    teacher = lab.teacher_cost()
    update, reading = lab.flops()
    mixture = sparse_config(lab.teacher.model, UPCYCLED)
    flops_per_second = teacher.tokens_per_second * reading
    seconds = train_flops_per_token(mixture, LENGTH) * lab.tokens / flops_per_second
    state_gb = tree_bytes(abstract_state(replace(lab.config(), model=mixture))) / 1e9
    parameters = count_parameters(lab.config().model).total
    per_second = "tokens/s into the cache"
    predicted = "PREDICTED hours a run on these tokens, at the FLOP/s of the teacher's reading"
    rows = [
        Measurement("teacher.bits", teacher.bits, "bits per byte"),
        Measurement("teacher.tokens_per_second", teacher.tokens_per_second, per_second),
        Measurement("teacher.reading_over_student_flops", reading / update, "ratio a token"),
        Measurement("cache_bytes_per_token", teacher.bytes_per_token, "bytes"),
        Measurement("tokens", lab.tokens, "tokens that the teacher reads"),
        Measurement("student_parameters", parameters, "parameters"),
        Measurement("upcycled_hours", seconds / 3600, predicted),
        Measurement("upcycled_state_gb", state_gb, "GB of parameters and moments"),
    ]
    return [replace(row, name=f"smollm2.{row.name}") for row in rows]


def verdict(rows: Mapping[str, Measurement], lab: SmolLM2Lab | None) -> str:
    """What SmolLM2's advice gives a small mixture of experts."""
    if lab is None:
        return "The comparison with SmolLM2 was left out."

    def value(name: str) -> float:
        number = rows[f"smollm2.{name}"].value
        assert number is not None
        return float(number)

    if rows["smollm2.tokens_to_ce_loss_ratio"].value is None:
        saved = "It does not reach the loss of the other."
    else:
        saved = (
            "It reaches the other's final loss with "
            f"{value('tokens_to_ce_loss_ratio'):.2f}x fewer tokens. With the teacher's reading "
            f"counted, the other needs {value('flops_to_ce_loss_ratio'):.2f}x its FLOPs "
            "(pre-training is not counted)."
        )
    return (
        f"SmolLM2-135M, pre-trained by others and not advanced, has {value('teacher.bits'):.3f} "
        "bits per byte on Python text. A student from scratch of "
        f"{value('student_parameters') / 1e6:.1f}M parameters, taught by cached samples, ends "
        f"{significance(rows['smollm2.kd_minus_ce_bits'])} from the same one without them. {saved} "
        f"Upcycling the teacher itself takes {value('upcycled_state_gb'):.1f} GB of state and "
        f"{value('upcycled_hours'):.1f} hours a run here, and was not tried."
    )


def draw(curves: Curves, lab: SmolLM2Lab) -> Figure:
    """Mean loss of the students over tokens, and over FLOPs with the teacher's reading."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    update, reading = lab.flops()
    for index, (arm, of_arm) in enumerate(curves.items()):
        tokens = np.array(of_arm[0].steps) * BATCH * LENGTH
        bits = [curve.bits for curve in of_arm]
        cost = update + reading if ARMS[arm] else update
        label = "taught by cached samples" if ARMS[arm] else "not taught"
        plot_band(left, tokens, bits, label=label, color=f"C{index}")
        plot_band(right, tokens * cost, bits, label=label, color=f"C{index}")
    for axes in (left, right):
        axes.axhline(lab.teacher_cost().bits, color="0.6", ls=":", label="SmolLM2-135M itself")
    left.set(xlabel="tokens that the student reads", ylabel="held-out bits per byte")
    right.set(xlabel="FLOPs, the teacher's reading included", xscale="log")
    left.legend(frameon=False)
    return figure


def main(argv: list[str]) -> None:
    """These students alone."""
    default = Settings(out="runs/distillation_smollm2")
    settings = parse_settings(default, argv, QUESTION)
    if settings.quick:
        settings = replace(settings, seeds=1)
    out = output_folder(settings.out)
    lab = open_lab(settings, out / "arms")
    if lab is None:
        return
    curves = lab.curves()
    rows = measurements(curves, lab)
    publish(
        out,
        experiment="distillation_smollm2",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict({row.name: row for row in rows}, lab),
        figures={"smollm2": draw(curves, lab)},
    )


if __name__ == "__main__":
    program(main)
