import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.balance import expert_loss, router_entropy, sequence_loss, update_bias, z_loss


def test_sequence_loss_equals_the_formula():
    rng = np.random.default_rng(0)
    scores, per_token = rng.uniform(0.1, 1, size=(3, 11, 5)), 2
    expected = []
    for sequence in scores:
        length, experts = sequence.shape
        counts = np.zeros(experts)
        for token in sequence:
            counts[np.argsort(-token)[:per_token]] += 1
        frequency = experts / (per_token * length) * counts
        probability = (sequence / sequence.sum(axis=1, keepdims=True)).mean(axis=0)
        expected.append((frequency * probability).sum())
    found = sequence_loss(jnp.asarray(scores, jnp.float32), per_token)
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


def test_sequence_loss_is_least_when_balanced():
    balanced = jnp.eye(4)[None].repeat(2, 0) + 0.1
    skewed = jnp.tile(jnp.array([1.1, 0.1, 0.1, 0.1]), (2, 4, 1))
    np.testing.assert_allclose(sequence_loss(balanced, 1), 1.0, rtol=1e-6)
    assert sequence_loss(skewed, 1) > 2


@pytest.mark.parametrize("loss", [lambda s: sequence_loss(s, 2), z_loss])
def test_losses_have_gradients(loss):
    scores = jax.random.uniform(jax.random.key(0), (2, 7, 5))
    gradient = jax.grad(loss)(scores)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 1e-4


@pytest.mark.parametrize("groups", [None, 3])
def test_expert_and_device_loss_equal_the_formula(groups):
    rng = np.random.default_rng(1)
    tokens, experts, per_token = 13, 6, 2
    scores = rng.uniform(0.1, 1, size=(tokens, experts))
    load = np.zeros(experts, int)
    for token in scores:
        load[np.argsort(-token)[:per_token]] += 1
    frequency = experts / (per_token * tokens) * load
    probability = (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)
    expected = 0.0
    members = np.array_split(np.arange(experts), groups or experts)
    for group in members:
        expected += frequency[group].mean() * probability[group].sum()
    found = expert_loss(jnp.asarray(scores, jnp.float32), jnp.asarray(load), groups)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_z_loss_equals_the_formula():
    logits = np.random.default_rng(0).normal(size=(6, 4))
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2)
    np.testing.assert_allclose(z_loss(jnp.asarray(logits)), expected, rtol=1e-5)


def test_bias_moves_against_the_load():
    bias = update_bias(jnp.zeros((2, 3)), jnp.array([[9, 3, 3], [5, 5, 5]]), 0.5)
    np.testing.assert_array_equal(bias, [[-0.5, 0.5, 0.5], [0, 0, 0]])


def test_entropy_is_log_e_when_indifferent():
    np.testing.assert_allclose(router_entropy(jnp.full((4, 8), 0.3)), np.log(8), rtol=1e-6)
    assert router_entropy(jnp.eye(8)) < 1e-6
