from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.model.attention import (
    AttentionMask,
    attend,
    document_context,
    make_attention,
    rotary_width,
)
from moe_jax.model.rope import rotation
from tests import oracle
from tests.conftest import GQA, MLA

SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3]])
WIDTH = 20


def build(config: AttentionConfig):
    model = ModelConfig(width=WIDTH, attention=config, init_std=0.3)
    return make_attention(model, out_std=0.3, key=jax.random.key(0)), model


def w(module, name: str) -> np.ndarray:
    return np.asarray(getattr(module, name).weight[...], np.float64)


def gqa_formula(module, x: np.ndarray, c: AttentionConfig, model: ModelConfig) -> np.ndarray:
    query, key, value = (x @ w(module, name) for name in ("query", "key", "value"))
    if c.qk_norm == "full":
        query, key = (oracle.rms_norm(a, model.norm_epsilon) for a in (query, key))
    query, key, value = (a.reshape(len(x), -1, c.head_dim) for a in (query, key, value))
    if c.qk_norm == "head":
        query, key = (oracle.rms_norm(a, model.norm_epsilon) for a in (query, key))
    query, key = oracle.rotate(query, model.rope_base), oracle.rotate(key, model.rope_base)
    return oracle.attention(query, key, value, SEGMENTS[0]).reshape(len(x), -1) @ w(module, "out")


def mla_formula(module, x: np.ndarray, c: AttentionConfig, model: ModelConfig) -> np.ndarray:
    length = len(x)
    source = x
    if c.q_rank:
        source = oracle.rms_norm(x @ w(module, "query_down"), model.norm_epsilon)
    query = (source @ w(module, "query_up")).reshape(length, c.heads, -1)
    down = x @ w(module, "kv_down")
    latent = oracle.rms_norm(down[:, : c.kv_rank], model.norm_epsilon)
    rope_key = oracle.rotate(down[:, None, c.kv_rank :], model.rope_base)
    rebuilt = (latent @ w(module, "kv_up")).reshape(length, c.heads, -1)
    turned = oracle.rotate(query[..., c.nope_dim :], model.rope_base)
    query = np.concatenate([query[..., : c.nope_dim], turned], axis=-1)
    shared = np.repeat(rope_key, c.heads, axis=1)
    key = np.concatenate([rebuilt[..., : c.nope_dim], shared], axis=-1)
    value = rebuilt[..., c.nope_dim :]
    return oracle.attention(query, key, value, SEGMENTS[0]).reshape(length, -1) @ w(module, "out")


@pytest.mark.parametrize(
    "config",
    [
        GQA,
        replace(GQA, kv_heads=4),
        replace(GQA, kv_heads=1),
        replace(GQA, qk_norm="head"),
        replace(GQA, qk_norm="full"),
        MLA,
        replace(MLA, q_rank=0),
    ],
    ids=["gqa", "multi-head", "multi-query", "norm per head", "norm over heads", "mla", "mla-lite"],
)
def test_equals_the_direct_formula(config):
    module, model = build(config)
    x = np.random.default_rng(0).normal(size=(9, WIDTH))
    out, _ = module(
        jnp.asarray(x[None], jnp.float32), document_context(model, jnp.asarray(SEGMENTS))
    )
    formula = gqa_formula if config.kind == "gqa" else mla_formula
    # float32 against float64
    np.testing.assert_allclose(out[0], formula(module, x, config, model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_gradients_reach_earlier_tokens_of_the_document_only(config, implementation):
    module, model = build(replace(config, implementation=implementation))
    attention = document_context(model, jnp.asarray(SEGMENTS))
    x = jax.random.normal(jax.random.key(0), (1, 9, WIDTH))
    jacobian = jax.jit(jax.jacobian(lambda x: module(x, attention)[0].sum(axis=-1)[0]))(x)
    reaches = np.abs(np.asarray(jacobian)[:, 0]).sum(axis=-1) > 0
    same = SEGMENTS[0][:, None] == SEGMENTS[0][None, :]
    np.testing.assert_array_equal(reaches, same & np.tril(np.ones((9, 9), bool)))


def test_a_shift_of_all_positions_changes_nothing():
    module, model = build(MLA)
    x = jax.random.normal(jax.random.key(0), (1, 9, WIDTH))
    attention = document_context(model, jnp.ones((1, 9), jnp.int32))
    width = rotary_width(MLA)
    turned = rotation(jnp.arange(5, 14)[None], width, model.rope_base)
    shifted = attention._replace(rotation=turned)
    # cos and sin of larger angles round differently
    np.testing.assert_allclose(module(x, shifted)[0], module(x, attention)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_softmax_is_taken_in_float32(implementation):
    """Two keys whose logits differ by less than bfloat16 resolves at their size."""
    query = jnp.full((1, 1, 1, 64), 8.0, jnp.bfloat16)
    key = jnp.full((1, 2, 1, 64), 8.0, jnp.bfloat16).at[0, 1, 0, 0].set(8.5)
    value = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    both = AttentionMask(jnp.asarray(1), jnp.ones((1, 1), int), jnp.ones((1, 2), int))
    out = attend(query, key, value, both, implementation)
    expected = 1 / (1 + np.exp(-0.5))  # logits 512 and 512.5; bfloat16 is spaced by 4 there
    np.testing.assert_allclose(float(out[0, 0, 0, 0]), expected, rtol=1e-2)
