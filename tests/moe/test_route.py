from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.moe.route import route
from tests import oracle

SIGMOID = MoEConfig(experts=8, experts_per_token=3, scale=2.5)
SOFTMAX = MoEConfig(experts=8, experts_per_token=3, gate="softmax", bias_rate=0)


@pytest.mark.parametrize(
    "config",
    [
        SIGMOID,
        replace(SIGMOID, normalise=False),
        replace(SIGMOID, groups=4, groups_per_token=2),
        replace(SIGMOID, groups=2, groups_per_token=1, experts_per_token=4),
        replace(SIGMOID, groups=4, groups_per_token=2, group_score="max"),
        replace(SIGMOID, groups=4, groups_per_token=2, experts_per_token=4, group_score="node"),
        replace(SIGMOID, groups=2, groups_per_token=1, experts_per_token=4, group_score="node"),
        replace(SIGMOID, experts_per_token=8),
        SOFTMAX,
        replace(SOFTMAX, normalise=False),
        replace(SOFTMAX, groups=4, groups_per_token=2),
        replace(SOFTMAX, experts=1, experts_per_token=1),
    ],
)
def test_equals_the_formula_for_each_token(config):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, config.experts)).astype(np.float32)
    bias = rng.normal(size=config.experts).astype(np.float32) * 0.3
    found = route(jnp.asarray(logits), jnp.asarray(bias), config)
    for t, token in enumerate(logits.astype(np.float64)):
        experts, weights = oracle.gate(token, bias, config)
        assert np.asarray(found.experts[t]).tolist() == experts
        # float32 sigmoid or softmax against float64: a few units in the last place
        np.testing.assert_allclose(found.weights[t], weights, rtol=2e-6)


def test_bias_changes_who_is_chosen_but_not_the_weight():
    config = MoEConfig(experts=4, experts_per_token=1, normalise=False)
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
    plain = route(logits, jnp.zeros(4), config)
    pushed = route(logits, jnp.array([0.0, 0.0, 0.0, 5.0]), config)
    assert plain.experts.tolist() == [[0]]
    assert pushed.experts.tolist() == [[3]]
    np.testing.assert_allclose(pushed.weights, jax.nn.sigmoid(jnp.array([[-1.0]])), rtol=1e-6)


def test_no_gradient_reaches_the_bias():
    logits = jax.random.normal(jax.random.key(0), (5, 8))
    gradient = jax.grad(lambda b: route(logits, b, SIGMOID).weights.sum())(jnp.ones(8))
    assert not np.any(gradient)


@pytest.mark.parametrize("config", [SIGMOID, SOFTMAX])
def test_ties_go_to_the_lower_index(config):
    found = route(jnp.zeros((2, 8)), jnp.zeros(8), config)
    assert found.experts.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("config", [SIGMOID, SOFTMAX])
def test_nan_logits_show_in_the_weights(config):
    found = route(jnp.full((1, 8), jnp.nan), jnp.zeros(8), config)
    assert np.isnan(found.weights).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "config", [SIGMOID, SOFTMAX, replace(SIGMOID, groups=4, groups_per_token=2)]
)
def test_a_single_nan_among_the_logits_is_chosen_and_shows(config, sign):
    logits = jnp.zeros((1, 8)).at[0, 5].set(np.copysign(np.float32(np.nan), sign))
    found = route(logits, jnp.zeros(8), config)
    assert np.isnan(found.weights).any()


def test_weights_are_normalised_and_scaled():
    logits = jax.random.normal(jax.random.key(1), (20, 8))
    found = route(logits, jnp.zeros(8), SIGMOID)
    np.testing.assert_allclose(found.weights.sum(axis=-1), 2.5, rtol=1e-6)
