from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.model.stages import whole_documents
from moe_jax.model.transformer import Transformer
from moe_jax.objectives.base import Part, forward, losses, token_nats, valid_targets
from moe_jax.objectives.next_token import next_token

LENGTH = 5
TOKENS = jnp.array([[10, 11, 12, 13, 14, 15, 16, 17]])
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2]])


@partial(nnx.jit, static_argnums=2)
def predictions(model, tokens, depth):
    hidden, _ = model.hidden(tokens[:, :LENGTH], SEGMENTS[:, :LENGTH])
    found = model.mtp.predictions(model, hidden, tokens, SEGMENTS)
    return [logits for _, logits, _ in found][depth - 1]


def test_targets_of_a_case_made_by_hand(small_model):
    """Depth 2: position i predicts token i + 2 with the first module and i + 3 with the second;
    only positions whose target is in the same document count."""
    config = replace(small_model, mtp_depth=2)
    model = Transformer(config, key=jax.random.key(0))
    batch = {"tokens": TOKENS, "segments": SEGMENTS}
    one = jnp.ones(())
    part = Part(batch, (one, one, one))
    found = nnx.jit(lambda model: losses(next_token, forward(model, part, LENGTH)).mtp)(model)

    def nats(logits, pairs):
        targets = jnp.zeros((1, LENGTH), jnp.int32)
        mask = jnp.zeros((1, LENGTH), bool)
        for position, token in pairs:
            targets = targets.at[0, position].set(token)
            mask = mask.at[0, position].set(True)
        return token_nats(logits, targets, mask)

    first = nats(predictions(model, TOKENS, 1), [(0, 12), (1, 13), (4, 16)])
    second = nats(predictions(model, TOKENS, 2), [(0, 13), (4, 17)])
    np.testing.assert_allclose(found, (first + second) / 2, rtol=1e-5)
    assert [float(valid_targets(batch, LENGTH, k)) for k in (1, 2, 3)] == [4, 3, 2]


def test_position_i_of_depth_k_sees_tokens_up_to_i_plus_k(small_model):
    config = replace(small_model, mtp_depth=2)
    model = Transformer(config, key=jax.random.key(0))
    for depth in (1, 2):
        plain = predictions(model, TOKENS, depth)
        for changed in range(TOKENS.shape[1]):
            moved = predictions(model, TOKENS.at[0, changed].add(1), depth)
            differs = np.abs(np.asarray(moved - plain)[0]).max(axis=-1) > 1e-6
            first = max(changed - depth, 0)
            assert not differs[:first].any(), "a token further ahead is not seen"
            if first < LENGTH and changed >= depth:
                assert differs[first], "the newest allowed token is seen"


@pytest.mark.slow  # tests/model/test_learning.py sees the gradients of all modules
def test_the_loss_trains_the_modules_and_the_shared_table(small_model):
    config = replace(small_model, mtp_depth=1, tied_embedding=False)
    graph, parameters, router = nnx.split(
        Transformer(config, key=jax.random.key(0)), nnx.Param, ...
    )

    def mtp_loss(p):
        batch = {"tokens": TOKENS, "segments": SEGMENTS}
        part = Part(batch, (jnp.ones(()),) * 2)
        return losses(next_token, forward(nnx.merge(graph, p, router), part, LENGTH)).mtp

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(mtp_loss))(parameters))
    for name in ("mtp", "embedding", "head", "sparse"):
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient[name])) > 1e-6, name


def test_normed_input_is_the_norm_that_the_head_reads(small_model):
    """As released weights need it. The depth has its own row of a scale that is not one."""
    config = replace(small_model, layers=1, mtp_depth=1, mtp_input="normed")

    @nnx.jit
    def found_and_expected(model):
        model.norm.scale[...] = jnp.linspace(0.5, 2.0, config.width)
        ones = jnp.ones_like(TOKENS)
        hidden, _ = model.hidden(TOKENS[:, :LENGTH], ones[:, :LENGTH])
        _, found, _ = next(model.mtp.predictions(model, hidden, TOKENS, ones))
        graph, parameters = nnx.split(model.mtp.modules)
        module = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], parameters))
        ahead = TOKENS[:, 1 : 1 + LENGTH]
        context = whole_documents(config, ahead, ones[:, :LENGTH], None)
        hidden, _ = module(model.norm(hidden), model.embed(ahead), context)
        return found, model.logits(hidden, module.norm)

    found, expected = found_and_expected(Transformer(config, key=jax.random.key(0)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
