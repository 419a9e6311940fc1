from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from moe_jax.config import MoEConfig
from moe_jax.study.layer_case import Shape
from moe_jax.study.lessons import (
    choices,
    draw_answers,
    draw_audit,
    draw_choices,
    draw_errors,
    draw_speeds,
    layer_speeds,
)
from tests.figures import cut_off, overlaps

MOE = MoEConfig(bias_rate=0, allow_acausal=True, rounding_tile=4)
RULES = ("top_k", "token_rounding", "expert_choice", "hash", "balanced")


def test_rules_choose_as_they_say():
    taken = {rule: choices(replace(MOE, rule=rule))[1] for rule in RULES}
    loads = {rule: one.sum(axis=0) for rule, one in taken.items()}
    for rule in ("top_k", "hash", "balanced"):
        assert set(taken[rule].sum(axis=1)) == {MOE.experts_per_token}
    assert loads["top_k"].argmax() < 2, "the first experts are popular"
    assert not (loads["token_rounding"] % MOE.rounding_tile).any()
    assert len(set(loads["expert_choice"])) == len(set(loads["balanced"])) == 1
    scores, best = choices(MOE)
    assert (np.sort(scores, axis=1)[:, -2:].sum(1) == np.sort(scores * best)[:, -2:].sum(1)).all()


@pytest.mark.slow
def test_the_layer_s_speed_counts_forward_and_backward():
    shape = Shape(tokens=16, width=8, hidden=8, experts=4, per_token=2)
    speeds = layer_speeds(shape, rounds=1)
    assert list(speeds) == ["reference", "xla"]
    assert all(0 < speed < 1e4 for speed in speeds.values())


def plan(total: float) -> Any:
    """As predict.answer gives it, for a card of 80."""
    return SimpleNamespace(
        memory=SimpleNamespace(total=total, card=80.0, fits=total <= 80),
        prediction=SimpleNamespace(seconds=2.0, low=1.0, high=4.0),
        rate=lambda seconds: 100 / seconds,
    )


def test_a_plan_that_does_not_fit_is_red_and_its_time_grey():
    memory, speed = draw_answers({"small": plan(40.0), "large": plan(120.0)}).axes
    assert [bar.get_width() for bar in memory.patches] == [0.5, 1.5]
    blue, red = (to_rgb(name) for name in ("tab:blue", "tab:red"))
    assert [bar.get_facecolor()[:3] for bar in memory.patches] == [blue, red]
    spans = [line.get_xdata() for line in speed.lines if len(line.get_xdata()) == 2]
    assert np.array_equal(spans, [[25.0, 100.0]] * 2)
    points = [line for line in speed.lines if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in points] == [50.0, 50.0]
    assert [to_rgb(line.get_color()) for line in points] == [blue, to_rgb("0.7")]


ROW = {"arch": 80, "registers": 40, "spill_bytes": 0}
FIGURES = {
    "answers": lambda: draw_answers({"a plan with a long name": plan(40), "another": plan(120)}),
    "choices": lambda: draw_choices([replace(MOE, rule=rule) for rule in RULES]),
    "speeds": lambda: draw_speeds({"reference": 45.0, "xla": 75.6}, "GFLOP/s", reference=190.0),
    "errors": lambda: draw_errors({"float32": {16: 1e-6, 33: 0.0}}, "width D"),
    "audit": lambda: draw_audit(
        {rows: [ROW, ROW | {"arch": 90}] for rows in (1, 2, 16)},
        ("registers", "spill_bytes"),
        "rows of a program",
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_covers_anything_else(name):
    figure = FIGURES[name]()
    assert not overlaps(figure)
    assert not cut_off(figure)


def test_an_error_of_zero_has_a_place():
    [line] = FIGURES["errors"]().axes[0].lines
    assert line.get_ydata().tolist() == [1e-6, 1e-8]
