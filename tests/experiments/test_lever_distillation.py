"""Lever 3: the arithmetic of the comparison, and a run that is stopped and goes on."""

import json

import numpy as np
import pytest

from experiments import lever_distillation as lever
from experiments.lever_distillation import ARMS, Arm, Curve, Settings


def test_first_below_interpolates():
    curve = Curve([10, 20, 30], [3.0, 2.0, 1.5])
    assert lever.first_below(curve, 2.5) == 15
    assert lever.first_below(curve, 1.5) == 30
    assert lever.first_below(curve, 4.0) == 10  # it began below
    assert lever.first_below(curve, 1.0) is None


def test_interval_of_paired_differences():
    mean, bounds = lever.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    np.testing.assert_allclose(bounds, [2 - 2.4841, 2 + 2.4841], atol=1e-3)
    assert lever.interval([1.0]) == (1.0, None)


def test_equal_flops_are_equal():
    """The longer run from scratch costs what teacher and taught student cost together."""
    settings = Settings()
    long = lever.arm_config("scratch_equal_flops", settings)
    spent = long.steps * lever.flops_per_token(ARMS["scratch_equal_flops"], long)
    student = lever.arm_config("kd", settings)
    teacher = lever.arm_config("teacher", settings)
    together = student.steps * lever.flops_per_token(ARMS["kd"], student)
    together += teacher.steps * lever.flops_per_token(ARMS["teacher"], teacher)
    np.testing.assert_allclose(spent, together, rtol=2e-3)
    plain = lever.flops_per_token(Arm(), student)
    assert lever.flops_per_token(ARMS["kd"], student) > plain


def curves(**finals):
    steps = [100, 200, 300]
    return {
        name: [
            Curve(steps, [finals.get(name, 2.0) + d + s * 0.01 for d in (1, 0.5, 0)])
            for s in range(3)
        ]
        for name in ARMS
    }


def test_the_figures():
    made = curves(upcycled_kd=1.5, upcycled=1.4, scratch=2.0, teacher=1.6)
    found = {m.name: m for m in lever.describe(made, Settings(), [0, 1, 2])}
    assert found["tokens_to_scratch_loss_ratio"].value == pytest.approx(300 / 200)
    every = found["flops_to_scratch_loss_ratio"].value
    given = found["flops_to_scratch_loss_ratio_teacher_given"].value
    assert every < given < 300 / 200
    against = found["student_minus_best_plain_bits"]
    assert against.baseline == "upcycled"
    assert against.value == pytest.approx(0.1)
    assert found["student_minus_teacher_bits"].value == pytest.approx(-0.1)
    assert "+0.100 (significant)" in lever.verdict(found)
    never = {m.name: m for m in lever.describe(curves(scratch=0.1), Settings(), [0, 1, 2])}
    assert never["tokens_to_scratch_loss_ratio"].value is None
    assert "no taught student" in lever.verdict(never)


@pytest.mark.slow
def test_a_quick_run_is_read_again(tmp_path, capsys):
    argv = ["--quick", "--out", str(tmp_path)]
    lever.main(argv)
    first = json.loads((tmp_path / "result.json").read_text())
    (tmp_path / "arms" / "kd-0.json").unlink()
    capsys.readouterr()
    lever.main(argv)
    printed = capsys.readouterr().out
    assert printed.count(" updates ") == 1  # the one that was missing
    assert (
        json.loads((tmp_path / "result.json").read_text())["measurements"]
        == (first["measurements"])
    )
