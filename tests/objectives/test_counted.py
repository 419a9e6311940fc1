"""Every objective counts the positions whose target is in their document, and no others."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import DistillConfig, OptimConfig
from moe_jax.data.batches import shifted_targets
from moe_jax.model.abstract import graph_of
from moe_jax.objectives import adversarial, distillation, policy
from moe_jax.objectives.base import OWN, Loss, forward, losses, valid_targets, whole_batch
from moe_jax.objectives.next_token import next_token
from moe_jax.train.step import make_gradient
from tests.conftest import SMALL_MODEL, make_run
from tests.objectives.test_distillation import states_of

LENGTH = 10
MODEL = replace(SMALL_MODEL, layers=1, dense_layers=1, init_std=0.3)
ROUTED = replace(SMALL_MODEL, layers=1, dense_layers=0, init_std=0.3, mtp_depth=2)
SEGMENTS = jnp.array(
    [
        [1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0, 0, 0],
        [1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3],
        [0] * 13,
        [1] * 13,
    ]
)
ROWS, WIDE = SEGMENTS.shape
PADDING = SEGMENTS == 0
_, VALID = shifted_targets(SEGMENTS, SEGMENTS, LENGTH)
CHUNKED = DistillConfig(chunk=20, alpha=0.7)
PERTURBED = adversarial.PerturbConfig(alpha=0.7, swap_vocabulary=40)
TEACHER = states_of(MODEL, 5)

OBJECTIVES = {
    "next_token": (next_token, ()),
    "weighted": (adversarial.weighted, ()),
    "smoothed": (adversarial.smoothed_objective(0.2), ()),
    "guess": (adversarial.guess_objective(0.5, MODEL), (TEACHER,)),
    "online": (distillation.online_objective(CHUNKED, [MODEL]), ([TEACHER],)),
    "sampled": (distillation.cached_objective(CHUNKED), ()),
    "top_k": (distillation.cached_objective(CHUNKED), ()),
    "virtual": (adversarial.perturbed_objective(PERTURBED, MODEL), (TEACHER,)),
    "random": (
        adversarial.perturbed_objective(replace(PERTURBED, kind="random"), MODEL),
        (TEACHER,),
    ),
    "swaps": (
        adversarial.perturbed_objective(replace(PERTURBED, kind="swaps"), MODEL),
        (TEACHER,),
    ),
    "policy": (policy.policy_objective(policy.GenerativeConfig(anchor=0.5), MODEL), (TEACHER,)),
}
SLOW = ("smoothed", "guess", "sampled", "random", "weighted", "swaps", "virtual", "top_k")
"""Slow, because each has a sibling whose masks are the same lines."""


def make_batch(name: str, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    batch = {"tokens": jnp.asarray(rng.integers(0, 61, SEGMENTS.shape)), "segments": SEGMENTS}
    if name in ("sampled", "top_k"):
        batch["teacher_tokens"] = jnp.asarray(rng.integers(0, 61, (ROWS, LENGTH, 3)))
    if name == "top_k":
        # Three tokens with 0.9 of the mass; they may not repeat.
        batch["teacher_tokens"] = (batch["teacher_tokens"][..., :1] + jnp.arange(3)) % 61
        batch["teacher_log_p"] = jnp.log(jnp.full((ROWS, LENGTH, 3), 0.3))
    if name == "weighted":
        batch[adversarial.WEIGHT] = jnp.arange(1.0, ROWS + 1)
    if name == "policy":
        batch[policy.ADVANTAGE] = jnp.array([1.0, -1.0, 2.0, -2.0])
        own = np.broadcast_to(np.arange(WIDE - 1) >= 2, (ROWS, WIDE - 1))
        batch |= {OWN: jnp.asarray(own), "old_log_q": jnp.full((ROWS, LENGTH), -4.0)}
    return batch


def spoilt(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with other values wherever nothing counts."""
    batch = dict(batch, tokens=jnp.where(PADDING, 60 - batch["tokens"], batch["tokens"]))
    for key, value in (("teacher_tokens", -7), ("teacher_log_p", jnp.nan)):
        if key in batch:
            batch[key] = jnp.where(VALID[..., None], batch[key], value)
    if "old_log_q" in batch:
        batch["old_log_q"] = jnp.where(VALID, batch["old_log_q"], jnp.nan)
    return batch


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in OBJECTIVES],
)
def test_nothing_at_other_positions_reaches_loss_or_gradient(name):
    """Other tokens in the padding, and NaN at every position without a target. The loss is divided
    by the whole batch's targets, so that the losses of micro-batches add up."""
    objective, operands = OBJECTIVES[name]
    model = ROUTED if name == "next_token" else MODEL
    graph = graph_of(model)
    parameters, router = states_of(model, 3)

    @jax.jit
    def gradient(parameters, batch, poison, targets=1.0):
        def total(parameters):
            part = whole_batch(batch, LENGTH, model.mtp_depth, jax.random.key(4))
            part = part._replace(normalisers=tuple(targets * n for n in part.normalisers))
            reading = forward(nnx.merge(graph, parameters, router), part, LENGTH)
            hidden = jnp.where(poison[..., None], jnp.nan, reading.hidden)
            parts = losses(objective, replace(reading, hidden=hidden), *operands)
            return parts.total(0.3), parts

        return jax.value_and_grad(total, has_aux=True)(parameters)

    batch = make_batch(name)
    plain = gradient(parameters, batch, jnp.zeros_like(VALID))
    other = gradient(parameters, spoilt(batch), ~VALID)
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        assert np.isfinite(two).all()
        np.testing.assert_array_equal(one, two)
    (total, parts), _ = plain
    assert total != 0
    (_, halved), _ = gradient(parameters, batch, jnp.zeros_like(VALID), 2.0)
    pairs = [(parts.cross_entropy, halved.cross_entropy)]
    if name not in ("next_token", "policy"):  # a mean over sequences (below)
        pairs.append((parts.distillation, halved.distillation))
    for one, half in pairs:
        np.testing.assert_allclose(half, one / 2, rtol=1e-4)
    for offset, key in ((0, "sparse"), (1, "mtp")):
        if key in parts.stats:
            tokens = [float(valid_targets(batch, LENGTH, offset + k)) for k in range(offset + 1)]
            found = parts.stats[key].load.sum(axis=-1)
            np.testing.assert_array_equal(found, 2 * np.array(tokens))


def test_another_document_changes_nothing_in_this_one():
    """The nats and the gradient of one document, with the others of its row changed."""
    graph = graph_of(MODEL)
    parameters, router = states_of(MODEL, 3)
    ours = VALID & (SEGMENTS[:, :LENGTH] == 2)

    def objective(reading):
        student = adversarial.student_of(reading)
        return Loss(jnp.where(ours.reshape(-1), student.nats(), 0).sum())

    @jax.jit
    def gradient(parameters, batch):
        def total(parameters):
            part = whole_batch(batch, LENGTH, 0, None)
            reading = forward(nnx.merge(graph, parameters, router), part, LENGTH)
            return losses(objective, reading).total(0)

        return jax.value_and_grad(total)(parameters)

    batch = make_batch("next_token")
    tokens = jnp.where(SEGMENTS == 2, batch["tokens"], 60 - batch["tokens"])
    plain = gradient(parameters, batch)
    other = gradient(parameters, batch | {"tokens": tokens})
    assert plain[0] > 1
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_the_policy_losses_of_micro_batches_add_up(tmp_path):
    """With padding in some of them: each is its part of the mean over all sequences."""
    config = make_run(tmp_path, MODEL, batch=ROWS)
    model = replace(MODEL, vocabulary=258)
    config = replace(config, model=model, data=replace(config.data, length=LENGTH))
    objective = policy.policy_objective(policy.GenerativeConfig(anchor=0.5), model)
    operands = (states_of(model, 5),)
    batch = make_batch("policy")
    split = replace(config, optim=OptimConfig(accumulation=2))
    parameters, router = states_of(model, 3)
    whole, parts = (
        jax.jit(make_gradient(c, objective))(
            parameters, router, batch, jax.random.key(0), *operands
        )
        for c in (config, split)
    )
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


def test_own_text_ends_with_its_document():
    segments = jnp.array([[1, 2, 2], [1, 1, 2], [1, 1, 1]])
    tokens = jnp.array([[9, 3, 3, 4, 9, 5, 5], [3, 9, 3, 4, 4, 4, 4], [3, 3, 9, 4, 4, 9, 4]])
    found = distillation.own_segments(segments, tokens, end=9)
    expected = [[1, 2, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(found, expected)
    endless = distillation.own_segments(segments, tokens, end=None)
    np.testing.assert_array_equal(endless[:, 3:], segments[:, -1:].repeat(4, axis=1))
