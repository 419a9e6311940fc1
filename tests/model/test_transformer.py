from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model import stages
from moe_jax.model.transformer import Transformer
from moe_jax.moe.module import RouterBias

SEGMENTS = jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]])


def build(config: ModelConfig, seed=0) -> Transformer:
    return Transformer(config, key=jax.random.key(seed))


@pytest.mark.slow
def test_gradients_reach_earlier_tokens_of_the_document_only(either_attention):
    graph, parameters, router = nnx.split(
        build(replace(either_attention, tied_embedding=False)), nnx.Param, RouterBias
    )

    def logits(rows):
        """Every position has a token of its own, so a row of the table is a position."""
        parameters["embedding"] = nnx.Param(rows)
        return nnx.merge(graph, parameters, router)(jnp.arange(12)[None], SEGMENTS)

    jacobian = jax.jacobian(lambda r: logits(r)[0, :, :7].sum(-1))(parameters["embedding"][...])
    reaches = np.abs(np.asarray(jacobian)[:, :12]).sum(axis=-1) > 0
    same = np.asarray(SEGMENTS[0][:, None] == SEGMENTS[0][None, :])
    np.testing.assert_array_equal(reaches, same & np.tril(np.ones((12, 12), bool)))


def test_a_document_does_not_depend_on_where_it_is_packed(either_attention):
    model = build(either_attention)
    document = jnp.array([[5, 9, 2, 7]])
    alone = model(document, jnp.ones((1, 4), jnp.int32))
    packed = model(
        jnp.concatenate([jnp.full((1, 5), 3), document], axis=1), jnp.array([[1] * 5 + [2] * 4])
    )
    np.testing.assert_allclose(packed[:, 5:], alone, rtol=1e-3, atol=1e-4)


def test_scanned_blocks_equal_the_blocks_one_by_one(small_model):
    model = build(small_model)
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 61)
    segments = jnp.ones_like(tokens)
    graph, parameters = nnx.split(model.sparse.blocks)
    context = stages.whole_documents(small_model, tokens, segments, None)
    run = jax.jit(lambda block, x: stages.run_block(nnx.merge(graph, block), x, context)[0])
    x, _ = model.begin(context)
    for layer in range(small_model.moe_layers):
        x = run(jax.tree.map(lambda leaf, i=layer: leaf[i], parameters), x)
    np.testing.assert_allclose(model.logits(x), model(tokens, segments), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_rematerialisation_changes_no_gradient(small_model, remat):
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 61)

    def gradient(config):
        graph, parameters, router = nnx.split(build(config), nnx.Param, RouterBias)

        def loss(p):
            return nnx.merge(graph, p, router)(tokens, jnp.ones_like(tokens)).std()

        return jax.jit(jax.grad(loss))(parameters)

    plain, recomputed = gradient(small_model), gradient(replace(small_model, remat=remat))
    for one, two in zip(jax.tree.leaves(plain), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_output_head(small_model, tied):
    model = build(replace(small_model, tied_embedding=tied))
    names = set(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert ("head" in names) is not tied


def test_dtypes_are_separate(small_model):
    config = replace(
        small_model, param_dtype="float32", compute_dtype="bfloat16", output_dtype="float16"
    )
    model = build(config)
    tokens = jnp.zeros((1, 4), jnp.int32)
    assert model.embedding[...].dtype == jnp.float32
    assert model.embed(tokens).dtype == jnp.bfloat16
    assert model(tokens, tokens + 1).dtype == jnp.float16


@pytest.mark.parametrize("dense_layers", [0, 3])
def test_all_sparse_and_all_dense(small_model, dense_layers):
    model = build(replace(small_model, dense_layers=dense_layers))
    tokens = jnp.zeros((1, 4), jnp.int32)
    assert np.isfinite(model(tokens, tokens + 1)).all()


def test_router_bias_is_not_a_parameter(small_model):
    _, parameters, router = nnx.split(build(small_model), nnx.Param, RouterBias)
    assert "bias" not in str(jax.tree_util.tree_structure(nnx.to_pure_dict(parameters)))
    assert [leaf.shape for leaf in jax.tree.leaves(router)] == [(2, 6)]
