"""Perturbations: their size, and that the adversarial one is worse than a random one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.adversarial import perturb

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(3, 5, 4)), jnp.float32)
W = jnp.asarray(RNG.normal(size=(4, 7)), jnp.float32)
"""A model: q = softmax(x W) at each position."""


def apart(shift):
    clean, moved = jax.nn.log_softmax(X @ W), jax.nn.log_softmax((X + shift) @ W)
    return jnp.sum(jnp.exp(clean) * (clean - moved))


def lengths(shift):
    return np.sqrt((np.asarray(shift, np.float64) ** 2).sum((1, 2)))


def test_the_ball_is_a_sequences_own():
    radius = jnp.asarray([1.0, 0.5, 2.0])
    np.testing.assert_allclose(lengths(perturb.to_ball(X, radius)), radius, rtol=1e-5)
    np.testing.assert_allclose(lengths(perturb.to_ball(1e-25 * X, radius)), radius, rtol=1e-4)
    assert not np.asarray(perturb.to_ball(jnp.zeros_like(X), radius)).any()
    np.testing.assert_allclose(perturb.radius_of(X, 0.1), 0.1 * lengths(X), rtol=1e-5)


def test_power_iteration_finds_the_hessians_leading_eigenvector():
    """Of one sequence, H being the Hessian of KL at no shift."""

    def of_first(shift):
        return apart(jnp.zeros_like(X).at[:1].set(shift))

    h = np.asarray(jax.hessian(of_first)(jnp.zeros((1, 5, 4)))).reshape(20, 20)
    values = np.linalg.eigvalsh(h)
    found = perturb.adversarial_shift(
        of_first, jax.random.key(0), X[:1], jnp.asarray([0.05]), steps=60
    )
    direction = np.asarray(found).reshape(-1) / 0.05
    np.testing.assert_allclose(direction @ h @ direction, values[-1], rtol=2e-2)
    assert values[-1] > 5 * values.mean()


@pytest.mark.parametrize("steps", [1, 3])
def test_the_adversarial_direction_is_worse_than_random_ones(steps):
    radius = perturb.radius_of(X, 0.1)
    random = [
        float(apart(perturb.random_shift(jax.random.key(k), X, radius))) for k in range(1, 30)
    ]
    found = perturb.adversarial_shift(apart, jax.random.key(0), X, radius, steps=steps)
    np.testing.assert_allclose(lengths(found), radius, rtol=1e-4)
    assert float(apart(found)) > max(random)


def test_random_swaps_change_so_many_tokens_and_never_the_first():
    tokens = jnp.asarray(RNG.integers(0, 9, (4, 12)))
    found = perturb.random_swaps(jax.random.key(1), tokens, 3, 9)
    changed = np.asarray(found != tokens)
    np.testing.assert_array_equal(changed.sum(1), 3)
    assert not changed[:, 0].any()
    assert int(found.max()) < 9


def test_padding_and_the_beginnings_of_documents_stay():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 0, 0], [1] * 8, [0] * 8])
    may_change = np.array([[0, 1, 0, 1, 1, 0, 0, 0], [0] + [1] * 7, [0] * 8], bool)
    tokens = jnp.asarray(RNG.integers(0, 9, (3, 8)))
    gradient = jnp.asarray(RNG.normal(size=(3, 8, 4)), jnp.float32)
    table = jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)
    for found in (
        perturb.random_swaps(jax.random.key(0), tokens, 4, 9, segments),
        perturb.adversarial_swaps(gradient, table, tokens, 4, 9, segments),
    ):
        changed = np.asarray(found != tokens)
        assert not changed[~may_change].any()
        np.testing.assert_array_equal(changed.sum(1), [3, 4, 0])
    shift = perturb.random_shift(jax.random.key(0), gradient, jnp.ones(3), segments != 0)
    assert not np.asarray(shift)[np.asarray(segments) == 0].any()
    np.testing.assert_allclose(lengths(shift), [1, 1, 0], rtol=1e-5)


def test_adversarial_swaps_are_the_best_by_enumeration():
    """A loss that is linear in the embeddings, where first order is exact."""
    table = jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)
    tokens = jnp.asarray(RNG.integers(0, 9, (2, 6)))
    gradient = jnp.asarray(RNG.normal(size=(2, 6, 4)), jnp.float32)

    def loss(tokens):
        return np.einsum("bld,bld->b", gradient, np.asarray(table)[tokens])

    found = np.asarray(perturb.adversarial_swaps(gradient, table, tokens, 1, 7))
    for row in range(2):
        trials = []
        for place in range(1, 6):
            for token in range(7):
                trial = np.asarray(tokens).copy()
                if trial[row, place] != token:
                    trial[row, place] = token
                    trials.append((loss(trial)[row], place, token))
        best = max(trials)
        assert found[row, best[1]] == best[2]
        np.testing.assert_allclose(loss(found)[row], best[0], rtol=1e-5)
    assert (found != np.asarray(tokens)).sum() == 2
    assert found[found != np.asarray(tokens)].max() < 7
