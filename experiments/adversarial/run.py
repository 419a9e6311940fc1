"""Does adversarial learning refine data, or take a student beyond its teacher?

    python experiments/adversarial/run.py [--out DIR] [--part NAME] [--quick]

Three adversaries stand beside their controls, with paired seeds. A discriminator filters a pool
with junk (beside DoReMi). A discriminator rewards the student's own text. Perturbations change the
input. The fourth part asks how far students go beyond their teachers without an adversary. A
finished run (an arm with a seed) is a file in DIR/runs and is never repeated.
"""

from dataclasses import dataclass
from typing import Literal

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from experiments.adversarial import beyond, data, generative, perturbation
from experiments.adversarial.figures import draw_bits, draw_frontier
from experiments.adversarial.lab import Lab
from experiments.adversarial.settings import FULL, QUICK
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.study.results import publish

QUESTION = "Does adversarial learning improve on distillation, on data selection, on the teacher?"
PARTS = {
    "data": data,
    "perturbation": perturbation,
    "generative": generative,
    "beyond": beyond,
}


@dataclass(frozen=True)
class Settings:
    """Trains small students in pairs, with an adversary and with its controls."""

    out: str = "runs/lever_adversarial"
    """Folder for result.json, plots and the finished runs."""
    part: Literal["all", "data", "perturbation", "generative", "beyond"] = "all"
    """Train only one part. result.json is written by `all`, which trains only the runs that are
    missing."""
    quick: bool = False
    """One seed of a few updates, and minutes of compilation: shows that everything runs."""


def agreed_first(rows: list[Measurement]) -> list[Measurement]:
    """The names that other documents quote, such as data_minus_kd_bits, come first."""
    agreed = [m for m in rows if m.name.endswith("_minus_kd_bits") and m.name.count("_") < 5]
    return agreed + [m for m in rows if m not in agreed]


def main(argv: list[str]) -> None:
    """Trains what is not there, compares, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    lab = Lab(out, QUICK if settings.quick else FULL)
    if settings.part != "all":
        PARTS[settings.part].run(lab)
        print(f"{settings.part} is trained; without --part, result.json is written")
        return
    rows: list[Measurement] = []
    sentences = []
    figures = {}
    for name, part in PARTS.items():
        runs = part.run(lab)
        of_part = part.measurements(runs, lab)
        sentences.append(part.verdict({row.name: row for row in of_part}))
        rows += of_part
        figures[name] = draw_bits(runs, name)
        if name == "generative":
            figures["frontier"] = draw_frontier(runs)
    publish(
        out,
        experiment="lever_adversarial",
        question=QUESTION,
        settings=settings,
        measurements=agreed_first(rows),
        verdict=" ".join(sentences),
        figures=figures,
    )


if __name__ == "__main__":
    program(main)
