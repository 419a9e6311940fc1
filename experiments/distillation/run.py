"""Does a pre-trained teacher make a mixture-of-experts student cheaper, or better than itself?

    python experiments/distillation/run.py [--out DIR] [--seeds N] [--steps N] [--quick]

For each seed a dense teacher is trained on the text of Python's standard library, byte by byte.
Every arm is then trained on the same batches in the same order: students from scratch with and
without the teacher, students upcycled from it (Komatsuzaki et al., arXiv:2212.05055) with and
without it, a dense student of the teacher's own size (Furlanello et al., arXiv:1805.04770), and
plain training given as many FLOPs as teacher and student together. The teacher's advice comes
online, from a cache, or on text that the student wrote. The students' experts are compared.
SmolLM2-135M teaches a small mixture of its own vocabulary where its wheel is installed. Arms of a
seed that are finished are read, not repeated.
"""

from dataclasses import replace

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from experiments.distillation import figures, smollm2
from experiments.distillation.arms import Settings, teacher_config
from experiments.distillation.lab import Lab
from experiments.distillation.measurements import measurements
from experiments.distillation.verdict import verdict
from moe_jax.base.result import output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.data.tokens import prepare
from moe_jax.study.results import publish

QUESTION = "What does a teacher save a mixture-of-experts student, its own cost counted?"


def main(argv: list[str]) -> None:
    """Trains what is not there, compares, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    if settings.quick:
        settings = replace(settings, seeds=1, steps=10, teacher_steps=10, smollm2_seeds=0)
    out = output_folder(settings.out)
    curves = Lab(settings, prepare(teacher_config().data), out / "arms").curves()
    rows = measurements(curves, settings)
    plots = {
        "loss": figures.draw_curves(curves, settings),
        "ends": figures.draw_ends(curves),
        "experts": figures.draw_experts(curves),
    }
    lab = smollm2.open_lab(settings, out / "arms")
    if lab:
        others = lab.curves()
        rows += smollm2.measurements(others, lab)
        plots["smollm2"] = smollm2.draw(others, lab)
    named = {row.name: row for row in rows}
    publish(
        out,
        experiment="lever_distillation",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=f"{verdict(named)} {smollm2.verdict(named, lab)}",
        figures=plots,
    )


if __name__ == "__main__":
    program(main)
