"""Dropout: its expectation, and that it acts in training only."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import ModelConfig
from moe_jax.model.dropout import dropout
from moe_jax.model.transformer import Transformer


def test_it_keeps_the_mean_and_drops_its_share():
    x = jnp.full((200, 200), 2.0)
    found = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(found), [0, 2 / 0.7], rtol=1e-6)
    # 40,000 draws: the standard deviation of the share is 0.0023, of the mean 0.0066
    assert abs((found == 0).mean() - 0.3) < 0.01
    assert abs(found.mean() - 2) < 0.03
    assert dropout(x, 0.3, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_the_model_drops_in_training_only(small_model):
    small_model = replace(small_model, layers=1, dense_layers=1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 7)))

    def hidden(rate, key):
        model = Transformer(replace(small_model, dropout=rate), key=jax.random.key(1))
        return model.hidden(tokens, jnp.ones_like(tokens), key=key)[0]

    plain, key = hidden(0.0, None), jax.random.key(2)
    np.testing.assert_array_equal(hidden(0.5, None), plain)
    np.testing.assert_array_equal(hidden(0.0, key), plain)
    dropped = hidden(0.5, key)
    assert float(jnp.abs(dropped - plain).max()) > 0.1
    np.testing.assert_array_equal(hidden(0.5, key), dropped)


def test_a_rate_of_one_is_refused():
    with pytest.raises(UserError, match=r"model.dropout is 1"):
        ModelConfig(dropout=1.0)
