"""Does adversarial learning refine data, or take a student beyond its teacher?

    python experiments/lever_adversarial.py [--out DIR] [--part NAME] [--quick]

Three adversaries, each beside its controls and with paired seeds: a discriminator that filters a
pool with junk (and DoReMi), a discriminator that rewards the student's own text, and perturbations
of the input. The fourth part asks how far students go beyond their teachers without an adversary.
A finished run (an arm with a seed) is a file in DIR/runs and is never repeated.
"""

from dataclasses import dataclass
from typing import Literal

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

import adversarial_beyond
import adversarial_data
import adversarial_generative
import adversarial_perturbation
import numpy as np
from adversarial_lab import FULL, QUICK, Lab, Runs
from matplotlib.figure import Figure

from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, program

QUESTION = "Does adversarial learning improve on distillation, on data selection, on the teacher?"
PARTS = {
    "data": adversarial_data,
    "perturbation": adversarial_perturbation,
    "generative": adversarial_generative,
    "beyond": adversarial_beyond,
}


@dataclass(frozen=True)
class Settings:
    """Trains small students in pairs, with an adversary and with its controls."""

    out: str = "runs/lever_adversarial"
    """Folder for result.json, plots and the finished runs."""
    part: Literal["all", "data", "perturbation", "generative", "beyond"] = "all"
    """Train only one part; result.json is written from all of them, when all are there."""
    quick: bool = False
    """One seed of a few updates, minutes of compilation: shows that everything runs."""


def draw_bits(runs: Runs, title: str) -> Figure:
    """Mean and range over seeds of each arm's held-out bits."""
    figure = Figure(figsize=(7, 0.32 * len(runs) + 1.1), layout="constrained")
    axes = figure.subplots()
    values = {arm: np.array([r["bits"] for r in found]) for arm, found in runs.items()}
    order = sorted(values, key=lambda arm: -values[arm].mean())
    for place, arm in enumerate(order):
        axes.plot(values[arm], [place] * len(values[arm]), ".", color="0.7")
        axes.plot(values[arm].mean(), place, "o", color="C0")
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="held-out bits per byte (each seed, and the mean)", title=title)
    return figure


def draw_frontier(runs: Runs) -> Figure:
    """Quality against coverage over temperatures, mean of the seeds; and the discriminators."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm, found in runs.items():
        x, y = (
            np.mean([run[name] for run in found], axis=0)
            for name in ("own_on_teacher", "teacher_on_own")
        )
        left.plot(x, y, ".-", label=arm)
        if "accuracy" in found[0]:
            accuracy = np.mean([run["accuracy"] for run in found], axis=0)
            width = min(10, len(accuracy))
            right.plot(np.convolve(accuracy, np.ones(width) / width, "valid"), label=arm)
    left.set(
        xlabel="student's bits per byte on the teacher's text",
        ylabel="teacher's bits per byte on the student's text",
        title=f"temperatures {adversarial_generative.TEMPERATURES[0]} (top right to left) to "
        f"{adversarial_generative.TEMPERATURES[-1]}",
    )
    left.legend(frameon=False)
    right.axhline(0.5, color="0.7", lw=1)
    right.set(xlabel="rounds", ylabel="discriminator's accuracy, mean of 10 rounds", ylim=(0, 1))
    right.legend(frameon=False)
    return figure


def main(argv: list[str]) -> None:
    """Trains what is not there, compares, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    for folder in ("runs", "plots"):
        (out / folder).mkdir(exist_ok=True)
    lab = Lab(out, QUICK if settings.quick else FULL)
    if settings.part != "all":
        PARTS[settings.part].run(lab)
        print(f"{settings.part} is trained; without --part, result.json is written")
        return
    found: list[Measurement] = []
    sentences = []
    for name, part in PARTS.items():
        runs = part.run(lab)
        rows = part.measurements(runs, lab)
        sentences.append(part.verdict({row.name: row for row in rows}))
        found += rows
        draw_bits(runs, name).savefig(out / "plots" / f"{name}.png", dpi=120)
        if name == "generative":
            draw_frontier(runs).savefig(out / "plots" / "frontier.png", dpi=120)
    sentence = "; ".join(sentences)
    agreed = [m for m in found if m.name.endswith("_minus_kd_bits") and m.name.count("_") < 5]
    found = agreed + [m for m in found if m not in agreed]
    write_result(
        out,
        experiment="lever_adversarial",
        question=QUESTION,
        config=settings,
        measurements=found,
        verdict=sentence,
    )
    for m in found:
        bounds = "" if m.interval is None else f"  [{m.interval[0]:+.4f}, {m.interval[1]:+.4f}]"
        print(f"{m.name:52} {m.value:+8.4f} {m.unit}{bounds}")
    print(f"\n{sentence}\n{out}/result.json, plots/")


if __name__ == "__main__":
    program(main)
