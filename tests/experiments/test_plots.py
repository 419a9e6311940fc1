"""The plots of the experiments speak to a reader: words, and none over another."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments.adversarial import beyond, data, generative, perturbation
from experiments.adversarial.figures import draw_bits, draw_frontier
from experiments.distillation.arms import ARMS, Settings
from experiments.distillation.curves import Curve
from experiments.distillation.figures import PANELS, draw_curves, draw_ends, draw_experts
from experiments.distillation.measurements import OWN_TEXT
from experiments.hot_cold import traces
from experiments.hot_cold.plots import draw_timelines
from experiments.hot_cold.replays import BUDGETS, SCOPES, Replays
from experiments.hot_cold.training_figures import draw_timeline as draw_training
from experiments.moe_layer.comparison import ROWS
from experiments.moe_layer.models import BESIDE
from experiments.moe_layer.plots import draw_models, draw_rates
from moe_jax.placement.policy import ONLINE
from moe_jax.placement.traffic import Traffic
from tests.figures import cut_off, overlaps, shown_texts

RANDOM = np.random.default_rng(0)


def assert_readable(figure, names):
    """Names of the code are neither labels, nor is a label cut off or covered."""
    figure.suptitle(f"a-run: {figure.get_suptitle()}")
    texts = [text.get_text() for text in shown_texts(figure)]
    codes = {name for name in names if "_" in name or name in ("kd", "lru", "xla")}
    assert not codes & set(texts)
    assert not [text for text in texts if any(code in text for code in codes if "_" in code)]
    assert not overlaps(figure)
    assert not cut_off(figure)


PARTS = {
    "data": [*data.ARMS, *(f"kd_{arm}" for arm in data.KD_ARMS)],
    "perturbation": list(perturbation.ARMS),
    "generative": list(generative.ARMS),
    "beyond": list(beyond.ARMS),
}


@pytest.mark.parametrize("part", PARTS)
def test_adversarial_bits(part):
    runs = {arm: [{"bits": value} for value in 2 + RANDOM.random(5)] for arm in PARTS[part]}
    assert_readable(draw_bits(runs, part), PARTS[part])


def test_adversarial_frontier():
    run = {"own_on_teacher": [2.0, 3.0], "teacher_on_own": [3.0, 2.0], "accuracy": [0.5] * 60}
    runs = {arm: [run, run] for arm in generative.ARMS}
    assert_readable(draw_frontier(runs), generative.ARMS)


def test_distillation():
    traits = {key: RANDOM.random(3).tolist() for key in PANELS} | {OWN_TEXT: 0.5}
    curves = {
        arm: [Curve([10, 20, 30], (3 - RANDOM.random(3)).tolist(), traits)] * 2 for arm in ARMS
    }
    for figure in (draw_curves(curves, Settings()), draw_ends(curves), draw_experts(curves)):
        assert_readable(figure, ARMS)


def test_hot_cold():
    names = ("static", *ONLINE)
    rates = {(name, scope): RANDOM.random(len(BUDGETS)) for name in names for scope in SCOPES}
    figure = traces.draw(Replays(rates, [0.9] * len(BUDGETS)), 8.0, 1000)
    assert_readable(figure, [*names, *SCOPES])
    kinds = {
        f"{kind}_at_25": SimpleNamespace(traffic=Traffic()) for kind in ("successor", "blocking")
    }
    assert_readable(draw_timelines(SimpleNamespace(by_name=kinds)), kinds)
    spans = [(what, 0.0, 1.0) for what in ("read", "write", "compute", "wait")]
    run = {"traffic": {"spans": spans}}
    assert_readable(draw_training({"tiers": [run], "blocking": [run]}), ["tiers"])


def test_moe_layer():
    assert_readable(draw_rates(dict.fromkeys(ROWS, (0.5, None)), "a layer"), ROWS[:2])
    rates = {f"Model-{index}B-A3B": dict.fromkeys(BESIDE, 0.5) for index in range(8)}
    assert_readable(draw_models(rates), BESIDE)
