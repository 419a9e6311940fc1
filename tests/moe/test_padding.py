"""Tokens of no document: they go to no expert, and change no statistic, loss or gradient."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig
from moe_jax.moe import balance
from moe_jax.moe.layer import Gate, Layer, moe_layer, router_stats
from moe_jax.moe.plan import make_plan
from moe_jax.moe.route import route
from moe_jax.moe.rules import RoutingContext

BASE = MoEConfig(
    experts=6,
    experts_per_token=2,
    expert_hidden=7,
    groups=3,
    groups_per_token=3,
    allow_acausal=True,
    rounding_tile=4,
    expert_loss=0.1,
    device_loss=0.1,
    sequence_loss=0.1,
    locality_loss=0.1,
    z_loss=0.1,
)
CONFIGS = {
    "top_k": BASE,
    "capacity": replace(BASE, capacity_factor=0.8),
    "kernels": replace(BASE, implementation="triton", gate="softmax", bias_rate=0),
    "noisy_top_k": replace(BASE, rule="noisy_top_k"),
    "token_rounding": replace(BASE, rule="token_rounding"),
    "expert_choice": replace(BASE, rule="expert_choice", bias_rate=0),
    "hash": replace(BASE, rule="hash", bias_rate=0),
}
DOCUMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9, [0] * 9])
TEXT = np.asarray(DOCUMENTS != 0)
PADDING = ~TEXT.reshape(-1)


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_changed_padding_changes_nothing(name):
    c = CONFIGS[name]
    noise = draw(7, 5, 6) if c.rule == "noisy_top_k" else None
    layer = Layer(Gate(draw(1, 5, 6), 0.1 * draw(2, 6), noise), draw(3, 6, 5, 14), draw(4, 6, 7, 5))

    @jax.jit
    def run(x, tokens):
        def loss(x, layer):
            context = RoutingContext(tokens, jax.random.key(5), DOCUMENTS)
            out, choice = moe_layer(x, layer, c, context)
            assert choice.stats.experts is not None
            text = jnp.where(TEXT[..., None], out, 0)
            return (text**2).sum() + choice.stats.loss, (text, choice.stats)

        (_, found), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, layer)
        return found, gradients

    x = draw(0, 3, 9, 5)
    tokens = jnp.arange(27).reshape(3, 9)
    changed = jnp.where(TEXT[..., None], x, 100 * draw(6, 3, 9, 5))
    plain = run(x, tokens)
    for one, two in zip(
        jax.tree.leaves(plain),
        jax.tree.leaves(run(changed, jnp.where(TEXT, tokens, 9))),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)
    (_, stats), (d_x, _) = plain
    assert np.all(np.asarray(stats.experts)[~TEXT] == 6), "no expert"
    assert np.any(np.asarray(stats.experts)[TEXT] < 6)
    assert stats.load.sum() == (np.asarray(stats.experts) < 6).sum()
    assert not np.any(np.asarray(d_x)[~TEXT])


@pytest.mark.parametrize("name", ["top_k", "token_rounding", "expert_choice"])
def test_not_even_nan_logits_of_padding_reach_the_others(name):
    c = CONFIGS[name]
    context = RoutingContext(key=jax.random.key(0), documents=DOCUMENTS)

    @jax.jit
    def run(logits):
        def loss(logits):
            routing = route(logits, jnp.zeros(6), c, context)
            plan = make_plan(routing.experts, 6)
            stats = router_stats(routing, plan, DOCUMENTS.shape, c, DOCUMENTS)
            return stats.loss + (routing.weights**2).sum(), stats

        return jax.value_and_grad(loss, has_aux=True)(logits)

    logits = draw(0, 27, 6)
    poisoned = jnp.where(PADDING[:, None], jnp.nan, logits)
    for one, two in zip(jax.tree.leaves(run(logits)), jax.tree.leaves(run(poisoned)), strict=True):
        assert np.isfinite(two).all()
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_losses_are_those_of_the_text_alone():
    """Means over all tokens of documents, with the padding cut out of the arrays."""
    scores = jax.nn.sigmoid(draw(0, 3, 9, 6))
    flat = scores.reshape(27, 6)
    counted = jnp.asarray(TEXT)
    of_tokens = counted.reshape(-1)
    alone = flat[np.flatnonzero(TEXT)]
    load = jnp.array([5, 1, 4, 9, 2, 11])
    pairs = [
        (balance.z_loss(flat, of_tokens), balance.z_loss(alone)),
        (balance.router_entropy(flat, of_tokens), balance.router_entropy(alone)),
        (
            balance.expert_loss(flat, load, 3, of_tokens),
            balance.expert_loss(alone, load, 3),
        ),
    ]
    # Sequences weigh by their tokens: 7, 9 and none.
    first = balance.sequence_loss(scores[:1, :7], 2)
    second = balance.sequence_loss(scores[1:2], 2)
    pairs.append((balance.sequence_loss(scores, 2, counted), (7 * first + 9 * second) / 16))
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_locality_stays_within_a_document():
    scores = jax.nn.sigmoid(draw(0, 3, 9, 6))
    chosen = jax.lax.top_k(scores, 2)[1]
    parts = [(0, slice(0, 3)), (0, slice(3, 7)), (1, slice(0, 9))]
    total = 0.0
    for row, own in parts:
        alone = balance.locality_loss(scores[row : row + 1, own], chosen[row : row + 1, own], 2)
        total += (own.stop - own.start) * float(alone)
    found = balance.locality_loss(scores, chosen, 2, DOCUMENTS)
    np.testing.assert_allclose(found, total / 16, rtol=1e-5)
