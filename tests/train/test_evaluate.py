import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data.tokens import prepare
from moe_jax.train.evaluate import AHEAD, make_evaluator, started_ahead
from moe_jax.train.state import init_state


@pytest.mark.parametrize("length", [16, 48, 1000])
def test_an_indifferent_model_needs_log2_v_bits_for_every_token(small_run, length):
    """Every token but each document's bos is predicted once, whatever the window and the batch."""
    config = replace(small_run, data=replace(small_run.data, length=length), batch=3)
    data = prepare(config.data, say=lambda _: None)
    array = data.validation
    state = init_state(config)
    state = state._replace(parameters=jax.tree.map(jnp.zeros_like, state.parameters))
    evaluate = make_evaluator(config, array, lambda batch: jax.tree.map(jnp.asarray, batch))
    targets = len(array.tokens) - len(array.starts)
    assert array.bytes == len(array.text())
    np.testing.assert_allclose(evaluate(state), targets * math.log2(258) / array.bytes, rtol=1e-5)


def test_an_evaluation_holds_a_few_batches_whatever_the_text():
    alive: list[int] = []
    most = 0

    def parts():
        nonlocal most
        for number in range(1000):
            alive.append(number)
            most = max(most, len(alive))
            yield number

    for expected, number in enumerate(started_ahead(parts())):
        assert number == expected
        alive.remove(number)
    assert alive == []
    assert most == AHEAD + 1
