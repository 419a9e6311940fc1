from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.model.generate import generate, generate_uncached, require_cache_room, sample
from moe_jax.model.transformer import Transformer
from tests.conftest import GQA, MLA


def split(model):
    graph, *states = nnx.split(model, nnx.Param, ...)
    return graph, tuple(states)


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_with_cache_equals_without(either_attention, temperature):
    model = Transformer(either_attention, key=jax.random.key(0))
    prompt = jax.random.randint(jax.random.key(1), (3, 5), 0, 61)
    settings = {"count": 3, "vocabulary": 50, "temperature": temperature, "top_k": 7}
    cached = generate(*split(model), prompt, jax.random.key(2), **settings)
    uncached = nnx.jit(lambda m: generate_uncached(m, prompt, jax.random.key(2), **settings))
    plain = uncached(model)
    np.testing.assert_array_equal(cached, plain)
    assert cached.shape == (3, 3)
    assert cached.max() < 50


def test_cached_logits_equal_a_full_pass(either_attention):
    """Also where the cache holds other documents: they are not seen."""
    model = Transformer(either_attention, key=jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 61)
    segments = jnp.array([[1] * 9, [1, 1, 2, 2, 2, 3, 3, 3, 3]])
    full, _ = nnx.jit(lambda model: model.hidden(tokens, segments))(model)
    extend = nnx.jit(lambda model, *given: model.extend(*given, segments))
    caches, pieces = model.empty_caches(2, 9), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        hidden, caches = extend(model, tokens[:, start:stop], jnp.asarray(start), caches)
        pieces.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, rtol=1e-4, atol=1e-5)


def test_the_last_document_of_a_packed_prompt_goes_on(small_model):
    model = Transformer(small_model, key=jax.random.key(0))
    prompt = jax.random.randint(jax.random.key(1), (3, 7), 0, 61)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2]] * 3)
    settings = {"count": 4, "vocabulary": 61, "temperature": 0.0}
    key = jax.random.key(2)
    packed = generate(*split(model), prompt, key, segments=segments, **settings)
    alone = generate(*split(model), prompt[:, 4:], key, **settings)
    np.testing.assert_array_equal(packed, alone)


def test_latent_attention_caches_only_the_latent(small_model):
    from tests.conftest import MLA

    model = Transformer(replace(small_model, attention=MLA), key=jax.random.key(0))
    caches = model.empty_caches(batch=2, slots=7)
    assert caches.sparse is not None
    assert [part.shape for part in caches.sparse] == [(2, 2, 7, 12), (2, 2, 7, 4)]


def test_top_k_and_temperature():
    logits = jnp.tile(jnp.array([0.0, 3.0, 2.0, 1.0]), (500, 1))
    key = jax.random.key(0)
    assert set(np.asarray(sample(key, logits, 0.0, 0))) == {1}
    assert set(np.asarray(sample(key, logits, 5.0, 2))) == {1, 2}
    assert set(np.asarray(sample(key, logits, 5.0, 0))) == {0, 1, 2, 3}


@pytest.mark.parametrize("attention", [GQA, MLA])
def test_caches_that_do_not_fit_are_refused(small_model, monkeypatch, attention):
    config = replace(small_model, attention=attention)
    caches = Transformer(config, key=jax.random.key(0)).empty_caches(2, 100)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    monkeypatch.setattr("moe_jax.model.generate.available_bytes", lambda: needed)
    require_cache_room(config, 2, 100)
    with pytest.raises(UserError, match=r"^2 x 101 tokens need 0.0 GB .* write fewer tokens$"):
        require_cache_room(config, 2, 101)
    monkeypatch.setattr("moe_jax.model.generate.available_bytes", lambda: None)
    require_cache_room(config, 2, 101)
    with pytest.raises(UserError, match="write fewer tokens"):
        require_cache_room(config, 2, 2**31)
