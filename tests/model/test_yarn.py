"""YaRN against its formula in NumPy, float64, up to positions past the original context."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.config import ModelConfig, YarnConfig
from moe_jax.model.attention import document_context, make_attention
from moe_jax.model.rope import frequencies, rotation
from tests import oracle
from tests.conftest import GQA, MLA

LENGTH = 40
ORIGINAL = 16
YARN = YarnConfig(factor=4.0, original_length=ORIGINAL, mscale=0.9, beta_fast=8.0)
BASES = (10_000.0, 100.0)


def formula(width: int, base: float, yarn: YarnConfig) -> np.ndarray:
    """One frequency after the other, as arXiv:2309.00071 and the code of DeepSeek-V2 have it."""
    result = []
    for pair in range(width // 2):
        frequency = base ** (-2 * pair / width)

        def dimension(turns):
            return width * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(dimension(yarn.beta_fast)), 0)
        high = min(math.ceil(dimension(yarn.beta_slow)), width - 1)
        ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
        result.append(frequency / yarn.factor * ramp + frequency * (1 - ramp))
    return np.array(result)


def rotated(x: np.ndarray, base: float, yarn: YarnConfig) -> np.ndarray:
    """oracle.rotate with scaled frequencies and lengths."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    angle = np.arange(len(x))[:, None] * formula(x.shape[-1], base, yarn)
    m = [0.1 * scale * math.log(yarn.factor) + 1 for scale in (yarn.mscale, yarn.mscale_all_dim)]
    turned = pairs * (np.exp(1j * angle) * m[0] / m[1])[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("width", [8, 32, 64])
def test_frequencies(base, width):
    ours = np.asarray(frequencies(width, base, YARN))
    np.testing.assert_allclose(ours, formula(width, base, YARN), rtol=1e-6)
    plain = base ** (-2 * np.arange(width // 2) / width)
    assert ours[0] == 1.0  # the fastest are kept, the slowest divided
    np.testing.assert_allclose(ours[-1], plain[-1] / 4, rtol=1e-6)


def test_factor_one_changes_no_bit():
    positions = jnp.arange(99)[None]
    plain = rotation(positions, 16, 1e4)
    scaled = rotation(positions, 16, 1e4, YarnConfig(factor=1.0, mscale=7.0, original_length=3))
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("scales", [(0.707, 0.707), (1.0, 0.0), (0.5, 1.0)])
def test_latent_attention_keeps_both_mscales_apart(scales):
    """Late positions have an error of their own if one factor stands in the place of the other."""
    yarn = replace(YARN, mscale=scales[0], mscale_all_dim=scales[1])
    model = ModelConfig(width=20, attention=MLA, init_std=0.3, yarn=yarn)
    module = make_attention(model, out_std=0.3, key=jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(LENGTH, 20))
    segments = np.ones((1, LENGTH), np.int32)
    run = nnx.jit(lambda module, x: module(x, document_context(model, jnp.asarray(segments)))[0])
    out = run(module, jnp.asarray(x[None], jnp.float32))
    w = {n: np.asarray(getattr(module, n).weight[...], np.float64) for n in WEIGHTS}
    query = oracle.rms_norm(x @ w["query_down"], model.norm_epsilon) @ w["query_up"]
    query = query.reshape(LENGTH, MLA.heads, -1)
    down = x @ w["kv_down"]
    latent = oracle.rms_norm(down[:, : MLA.kv_rank], model.norm_epsilon)
    rebuilt = (latent @ w["kv_up"]).reshape(LENGTH, MLA.heads, -1)
    shared = rotated(down[:, None, MLA.kv_rank :], 1e4, yarn)
    turned = rotated(query[..., MLA.nope_dim :], 1e4, yarn)
    query = np.concatenate([query[..., : MLA.nope_dim], turned], axis=-1)
    shared = np.repeat(shared, MLA.heads, axis=1)
    key = np.concatenate([rebuilt[..., : MLA.nope_dim], shared], axis=-1)
    softmax = (0.1 * scales[1] * math.log(4.0) + 1) ** 2
    mixed = oracle.attention(query * softmax, key, rebuilt[..., MLA.nope_dim :], segments[0])
    expected = mixed.reshape(LENGTH, -1) @ w["out"]
    np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-4)


WEIGHTS = ("query_down", "query_up", "kv_down", "kv_up", "out")


def test_grouped_queries_are_rotated_by_the_scaled_angles():
    model = ModelConfig(width=20, attention=GQA, init_std=0.3, yarn=YARN)
    context = document_context(model, jnp.ones((1, LENGTH), jnp.int32))
    x = np.random.default_rng(0).normal(size=(LENGTH, 1, GQA.head_dim))
    turned = rotated(x, 1e4, YARN)
    half = GQA.head_dim // 2
    cos, sin = (np.asarray(part[0])[:, None] for part in context.rotation)
    first, second = x[..., :half], x[..., half:]
    ours = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    np.testing.assert_allclose(ours, turned, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0.5}, "model.yarn.factor=0.5 is below 1"),
        ({"beta_fast": 1.0}, "beta_fast=1.0 must exceed beta_slow=1.0"),
        ({"original_length": 0}, "model.yarn.original_length is 0"),
    ],
)
def test_impossible_settings_are_one_line(change, message):
    with pytest.raises(UserError, match=message):
        YarnConfig(**change)


def test_the_scale_of_the_softmax_is_latent_attentions():
    with pytest.raises(UserError, match=r"mscale_all_dim=1.0 needs attention.kind=mla"):
        ModelConfig(attention=GQA, yarn=YarnConfig(factor=2.0, mscale_all_dim=1.0))
