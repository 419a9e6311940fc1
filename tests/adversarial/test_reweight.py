"""DoReMi and selection by excess loss, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.adversarial import reweight
from moe_jax.base.errors import UserError


def test_excess_is_clipped_a_document_and_averaged_a_source():
    loss = jnp.asarray([3.0, 1.0, 5.0, 2.0])
    reference = jnp.asarray([1.0, 2.0, 4.5, 2.0])
    found = reweight.group_excess(loss, reference, jnp.asarray([0, 0, 2, 2]), 4)
    # source 0: (2 + 0)/2, not (2 - 1)/2; source 2: (0.5 + 0)/2; 1 and 3 have no document
    np.testing.assert_allclose(found, [1.0, 0, 0.25, 0])


def test_update_by_hand():
    """a = (1/2, 1/4, 1/4), l = (log 2, 0, log 4), eta = 1: a · exp(l) = (1, 1/4, 1), sum 9/4."""
    weights, excess = jnp.asarray([0.5, 0.25, 0.25]), jnp.log(jnp.asarray([2.0, 1.0, 4.0]))
    found = reweight.doremi_update(weights, excess, smoothing=0.0)
    np.testing.assert_allclose(found, [4 / 9, 1 / 9, 4 / 9], rtol=1e-6)
    found = reweight.doremi_update(weights, excess, smoothing=0.3)
    np.testing.assert_allclose(found, 0.7 * np.array([4, 1, 4]) / 9 + 0.1, rtol=1e-6)
    half = reweight.doremi_update(weights, excess, rate=0.5, smoothing=0.0)
    raw = np.array([0.5 * 2**0.5, 0.25, 0.5])
    np.testing.assert_allclose(half, raw / raw.sum(), rtol=1e-6)


def test_update_survives_large_losses_and_keeps_every_source():
    found = reweight.doremi_update(jnp.asarray([0.5, 0.5]), jnp.asarray([1e4, 0.0]))
    np.testing.assert_allclose(found, [1 - 5e-4, 5e-4], rtol=1e-5)
    with pytest.raises(UserError, match="smoothing is 2"):
        reweight.doremi_update(jnp.ones(2), jnp.ones(2), smoothing=2.0)


def test_the_weights_are_the_gradient_ascent_of_the_game():
    """Against a fixed proxy the weight goes to the source that is furthest above its reference."""
    weights = jnp.full(3, 1 / 3)
    for _ in range(200):
        weights = reweight.doremi_update(weights, jnp.asarray([0.1, 0.3, 0.2]))
    assert int(weights.argmax()) == 1
    assert float(weights[1]) > 0.99


def test_item_weights_make_the_expected_loss_the_weighted_one():
    weights, shares = jnp.asarray([0.2, 0.8]), jnp.asarray([0.75, 0.25])
    of_source = np.array([3.0, 7.0])
    group = jnp.asarray([0] * 3 + [1])  # drawn with their shares
    values = of_source[np.asarray(group)] * np.asarray(
        reweight.item_weights(weights, shares, group)
    )
    np.testing.assert_allclose(values.mean(), 0.2 * 3 + 0.8 * 7, rtol=1e-6)


def test_excess_selection_takes_the_learnable():
    loss = jnp.asarray([9.0, 2.0, 4.0, 3.0])
    reference = jnp.asarray([9.0, 1.5, 1.0, 1.0])  # the first is noise to the reference too
    np.testing.assert_array_equal(reweight.excess_selection(loss, reference, 2), [2, 3])
    with pytest.raises(UserError, match="cannot keep 5 of 4"):
        reweight.excess_selection(loss, reference, 5)
