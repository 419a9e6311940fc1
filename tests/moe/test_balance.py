import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.balance import (
    expert_loss,
    locality_loss,
    router_entropy,
    sequence_loss,
    update_bias,
    z_loss,
)


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


def _stay(scores):
    return locality_loss(scores, jax.lax.top_k(scores, 2)[1])


@pytest.mark.parametrize("loss", [lambda s: sequence_loss(s, 2), _stay, z_loss])
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


@pytest.mark.parametrize("window", [1, 3, 20])
def test_locality_loss_equals_the_formula(window):
    rng = np.random.default_rng(2)
    scores = rng.uniform(0.1, 1, size=(2, 9, 6))
    chosen = np.argsort(rng.uniform(size=scores.shape), axis=-1)[..., :2]
    stays = []
    for s, own in zip(scores, chosen, strict=True):
        for t in range(len(s)):
            before = own[max(0, t - window) : t].ravel().tolist()
            share = [before.count(e) * 2 / max(1, len(before)) for e in range(6)]
            stays.append((np.array(share) * s[t] / s[t].sum()).sum())
    found = locality_loss(jnp.asarray(scores, jnp.float32), jnp.asarray(chosen), window)
    np.testing.assert_allclose(found, 1 - np.mean(stays), rtol=1e-5)


def test_locality_loss_is_least_where_tokens_stay():
    one_hot = jnp.eye(4)[jnp.array([[1] * 2000, [0, 1, 2, 3] * 500])] + 1e-9
    picks = one_hot.argmax(-1, keepdims=True)
    np.testing.assert_allclose(locality_loss(one_hot[:1], picks[:1]), 0, atol=3e-3)
    np.testing.assert_allclose(locality_loss(one_hot[1:], picks[1:]), 0.75, atol=3e-3)


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
