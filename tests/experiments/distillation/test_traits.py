"""A teacher's cache along the batches that a student reads."""

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.distillation import arms, traits
from moe_jax.data.batches import train_batches
from moe_jax.data.tokenizer import make_tokenizer
from moe_jax.data.tokens import TokenArray
from moe_jax.distill.cache import CacheConfig
from moe_jax.distill.teacher import Teacher
from moe_jax.model.abstract import abstract_states, graph_of


@pytest.mark.slow
def test_a_cache_along_the_batches(tmp_path):
    """Each row's samples are those that the teacher draws for exactly the tokens of that row."""
    tokenizer = make_tokenizer("bytes", ())
    model = arms.teacher_config().resolved().model
    abstract, router = abstract_states(model)
    keys = iter(jax.random.split(jax.random.key(0), 99))
    parameters = jax.tree.map(lambda p: 0.1 * jax.random.normal(next(keys), p.shape), abstract)
    teacher = Teacher(model, parameters, router, tokenizer)
    tokens = np.random.default_rng(0).integers(0, 256, 16 * 20 + 1).astype(np.uint16)
    array = TokenArray(tokens, np.arange(0, len(tokens), 37), len(tokens), tokenizer)
    source = train_batches(array, 16, 4, 0)
    batches = [next(source) for _ in range(5)]
    config = CacheConfig("top_k", count=5, batch=4, shard=8)
    cached = list(traits.with_cache(batches, teacher, config, tmp_path))
    assert len(cached) == 5
    built = nnx.merge(graph_of(model), parameters, router)
    for batch, beside in zip(batches, cached, strict=True):
        np.testing.assert_array_equal(beside["tokens"], batch["tokens"])
        logits = built(*(batch[k][:, :16] for k in ("tokens", "segments")))[..., :258]
        log_p, best = jax.lax.top_k(jax.nn.log_softmax(logits), 5)
        np.testing.assert_allclose(beside["teacher_log_p"], log_p, atol=5e-3)  # float16
        assert (beside["teacher_tokens"] == np.asarray(best)).mean() > 0.95  # ties in float32
