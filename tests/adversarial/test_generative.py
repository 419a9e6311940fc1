"""The discriminator's loss and the policy gradient, on models small enough to enumerate."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.adversarial import generative
from moe_jax.model.transformer import Transformer
from moe_jax.moe.module import RouterBias

V, L = 3, 2
LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(L, V)), jnp.float32)
"""A policy whose tokens are independent: q(y) = prod_t softmax(LOGITS[t])[y_t]."""
REWARD = np.random.default_rng(1).normal(size=(V, V))
SEQUENCES = list(product(range(V), repeat=L))


def log_q(logits, tokens):
    return (
        jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[:, :, None], axis=-1)[
            ..., 0
        ]
        if logits.ndim == 3
        else log_q(jnp.broadcast_to(logits, (len(tokens), L, V)), tokens)
    )


def probability(sequence):
    q = np.asarray(jax.nn.softmax(LOGITS))
    return float(np.prod([q[t, token] for t, token in enumerate(sequence)]))


def expected_reward(logits):
    q = jax.nn.softmax(logits)
    return jnp.einsum("i,j,ij->", q[0], q[1], REWARD)


def test_policy_gradient_is_unbiased():
    """Over every pair of samples with its probability, the mean gradient is that of -E[reward],
    times (n - 1)/n for the baseline's share of each reward and 1/L for the mean over tokens."""
    estimate_all = jax.jit(
        jax.vmap(
            lambda a, r: jax.grad(
                lambda z: generative.policy_loss(
                    log_q(z, a), log_q(LOGITS, a), r - r.mean(), jnp.ones((2, L), bool)
                )
            )(LOGITS)
        )
    )
    pairs = list(product(SEQUENCES, repeat=2))
    tokens = jnp.asarray(pairs)
    rewards = jnp.asarray([[REWARD[s] for s in pair] for pair in pairs], jnp.float32)
    weights = jnp.asarray([probability(a) * probability(b) for a, b in pairs])
    mean = jnp.einsum("p,plv->lv", weights, estimate_all(tokens, rewards))
    expected = -jax.grad(expected_reward)(LOGITS) / 2 / L
    np.testing.assert_allclose(mean, expected, atol=1e-6)
    assert float(jnp.abs(expected).max()) > 1e-2


def test_the_baseline_changes_the_variance_and_not_the_mean():
    tokens, weights = jnp.asarray(SEQUENCES), np.array([probability(s) for s in SEQUENCES])
    rewards = jnp.asarray([REWARD[s] for s in SEQUENCES], jnp.float32)

    def gradients(shift):
        def one(row, reward):
            loss = lambda z: generative.policy_loss(  # noqa: E731
                log_q(z, row[None]),
                log_q(LOGITS, row[None]),
                reward[None] + shift,
                jnp.ones((1, L), bool),
            )
            return jax.grad(loss)(LOGITS).reshape(-1)

        return np.asarray(jax.vmap(one)(tokens, rewards))

    plain, shifted = gradients(0.0), gradients(10.0)
    np.testing.assert_allclose(weights @ plain, weights @ shifted, atol=1e-5)
    spread = [float(weights @ (g**2).sum(-1)) for g in (plain, shifted)]
    assert spread[1] > 10 * spread[0]


def test_clipping_stops_what_moved_far_enough_and_only_that():
    """Ratio 1.5 with clip 0.2: nothing more for a good sequence, the full pull for a bad one."""
    old, mask = jnp.zeros((1, 1)), jnp.ones((1, 1), bool)

    def slope(log_ratio, advantage):
        loss = lambda x: generative.policy_loss(  # noqa: E731
            x[None, None], old, jnp.asarray([advantage]), mask
        )
        return float(jax.grad(loss)(jnp.log(log_ratio)))

    assert slope(1.5, 1.0) == 0
    np.testing.assert_allclose(slope(1.5, -1.0), 1.5, rtol=1e-6)
    np.testing.assert_allclose(slope(1.1, 1.0), -1.1, rtol=1e-6)
    assert slope(0.5, -1.0) == 0


def test_only_written_tokens_count_and_each_sequence_weighs_the_same():
    log, mask = jnp.zeros((2, 4)), jnp.asarray([[0, 1, 1, 1], [0, 0, 0, 1]], bool)
    slope = jax.grad(lambda x: generative.policy_loss(x, log, jnp.asarray([1.0, 2.0]), mask))(log)
    np.testing.assert_allclose(slope, [[0, -1 / 6, -1 / 6, -1 / 6], [0, 0, 0, -1]], rtol=1e-6)


def test_advantage_of_a_group():
    found = generative.group_advantage(jnp.asarray([[1.0, 3.0], [5.0, 5.0]]))
    np.testing.assert_allclose(found, [[-1, 1], [0, 0]], atol=1e-4)


def test_discriminator_loss_and_accuracy():
    teacher, student = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    direct = np.mean(-np.log(1 / (1 + np.exp(-(teacher - student)))))
    found = generative.discriminator_loss(jnp.asarray(teacher), jnp.asarray(student))
    np.testing.assert_allclose(found, direct, rtol=1e-6)
    assert float(generative.accuracy(jnp.asarray(teacher), jnp.asarray(student))) == 0.5


def test_distinct_sees_collapse():
    varied, collapsed = jnp.arange(12).reshape(2, 6), jnp.tile(jnp.asarray([[7, 8]]), (2, 3))
    assert generative.distinct(varied, 2) == 1
    assert generative.distinct(collapsed, 2) == 2 / 10


def test_a_discriminator_starts_as_a_copy_of_the_student(small_model):
    small_model = replace(small_model, layers=1, dense_layers=0)
    model = Transformer(small_model, key=jax.random.key(3))
    _, parameters, router = nnx.split(model, nnx.Param, RouterBias)
    graph, mine, bias = generative.make_discriminator(small_model, parameters, router, seed=1)
    copied = nnx.to_pure_dict(mine)["trunk"]
    jax.tree.map(np.testing.assert_array_equal, copied, nnx.to_pure_dict(parameters))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (4, 9)))
    scores = nnx.merge(graph, mine, bias)(tokens)
    assert scores.shape == (4,)
    assert len(set(np.asarray(scores).tolist())) == 4
