from dataclasses import replace

import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.placement.trace import read_trace
from moe_jax.runs.inspect import record_routing
from moe_jax.runs.load import load_run


def test_a_recorded_trace_is_the_models_own_routing(finished_run, tmp_path):
    run = load_run(finished_run.out)
    length = run.config.data.length
    text = "def f(x):\n    return x + 1\n" * 8
    path = tmp_path / "a.trace"
    count = record_routing(run, [("code", text), ("prose", text)], path, domains=("code", "prose"))
    trace = read_trace(path)
    assert len(trace.chosen) == count == 2 * (len(text.encode()) // length) * length
    assert trace.domain.tolist() == [0] * (count // 2) + [1] * (count // 2)
    shown = run.routing(text[: length - 1])
    expected = np.array([layers for _, layers in shown])
    np.testing.assert_array_equal(trace.chosen[1:length], expected)


@pytest.mark.parametrize("per_token", [1, 2])
def test_a_rule_that_rounds_in_training_is_recorded_too(finished_run, tmp_path, per_token):
    """Outside training a token has K experts, fewer than the slots that rounding may fill."""
    run = load_run(finished_run.out)
    moe = replace(
        run.config.model.moe,
        rule="token_rounding",
        experts_per_token=per_token,
        normalise=per_token > 1,
    )
    model = replace(run.config.model, moe=moe)
    run = replace(run, config=replace(run.config, model=model))
    path = tmp_path / "a.trace"
    record_routing(run, [("code", "x = 1\n" * 40)], path, domains=("code",))
    assert read_trace(path).chosen.shape[2] == per_token


def test_texts_shorter_than_a_window_are_refused(finished_run, tmp_path):
    run = load_run(finished_run.out)
    with pytest.raises(UserError, match="no text has the 48 tokens"):
        record_routing(run, [("code", "x")], tmp_path / "a.trace", domains=("code",))
