"""Does a pre-trained teacher make a mixture-of-experts student cheaper, or better than itself?

    python experiments/lever_distillation.py [--out DIR] [--seeds N] [--steps N] [--quick]

For each seed a dense teacher is trained on the text of Python's standard library, byte by byte, and
then every arm on the same batches in the same order: students from scratch with and without the
teacher, students upcycled from it (Komatsuzaki et al., arXiv:2212.05055) with and without it, a
dense student of the teacher's own size (Furlanello et al., arXiv:1805.04770), and plain training
given as many FLOPs as teacher and student together. The teacher's advice comes online, from a
cache, or on text that the student wrote; the students' experts are compared. SmolLM2-135M teaches a
small mixture of its own vocabulary where its wheel is installed. Arms of a seed that are finished
are read, not repeated.
"""

from dataclasses import replace
from pathlib import Path

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

import distillation_figures as figures
import distillation_smollm2 as smollm2
from distillation_arms import Curves, Runner, Settings, arms_of, seeds_of, teacher_config

from moe_jax.base.result import output_folder, write_result
from moe_jax.cli import parse_settings, program
from moe_jax.data.tokens import prepare

QUESTION = "What does a teacher save a mixture-of-experts student, its own cost counted?"


def train_arms(settings: Settings, folder: Path) -> Curves:
    """All byte-level arms, seed by seed, so that a stopped run has whole pairs."""
    runner = Runner(settings, prepare(teacher_config().data), folder)
    curves: Curves = {name: [] for name in arms_of(settings)}
    for seed in settings.all_seeds():
        for name, found in curves.items():
            if seed in seeds_of(name, settings):
                found.append(runner.curve(name, seed))
    return curves


def main(argv: list[str]) -> None:
    """Trains what is not there, compares, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    if settings.quick:
        settings = replace(settings, seeds=1, steps=10, teacher_steps=10, smollm2_seeds=0)
    out = output_folder(settings.out)
    for folder in ("arms", "plots"):
        (out / folder).mkdir(exist_ok=True)
    curves = train_arms(settings, out / "arms")
    found = figures.describe(curves, settings)
    plots = {
        "loss": figures.draw_curves(curves, settings),
        "ends": figures.draw_ends(curves),
        "experts": figures.draw_experts(curves),
    }
    route = smollm2.open_route(settings, out / "arms")
    if route:
        others = route.run()
        found += smollm2.describe(others, route)
        plots["smollm2"] = smollm2.draw(others, route)
    named = {m.name: m for m in found}
    sentence = f"{figures.verdict(named)}; {smollm2.verdict(named, route)}"
    for name, figure in plots.items():
        figure.savefig(out / "plots" / f"{name}.png", dpi=120)
    write_result(
        out,
        experiment="lever_distillation",
        question=QUESTION,
        config=settings,
        measurements=found,
        verdict=sentence,
    )
    figures.report(found)
    print(f"\n{sentence}\n{out}/result.json, plots/")


if __name__ == "__main__":
    program(main)
