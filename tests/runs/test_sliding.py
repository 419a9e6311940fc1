"""The sliding window against one token after the other."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.data.tokenizer import make_tokenizer
from moe_jax.data.tokens import TokenArray
from moe_jax.distill.teacher import Teacher
from moe_jax.model.abstract import graph_of, split_model
from moe_jax.model.transformer import Transformer
from moe_jax.runs.sliding import sliding_bits_per_byte
from tests.conftest import SMALL_MODEL

TEXTS = ("def f(x):", "", "return a + b", "ü")
LENGTH = 6


@pytest.fixture(scope="module")
def case():
    tokenizer = make_tokenizer("bytes", [])
    rows = [[tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] for text in TEXTS]
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    size = sum(len(text.encode()) for text in TEXTS)
    text = TokenArray(np.concatenate(rows).astype(np.uint16), starts, size, tokenizer)
    config = replace(SMALL_MODEL, layers=1, dense_layers=1, vocabulary=tokenizer.vocabulary)
    _, *states = split_model(Transformer(config, key=jax.random.key(0)))
    return Teacher(config, *states, tokenizer), text


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=SLOW), pytest.param(6, marks=SLOW)])
def test_every_token_is_predicted_once_from_its_window(case, stride):
    teacher, text = case
    model = nnx.merge(graph_of(teacher.model), teacher.parameters, teacher.router)
    run = nnx.jit(lambda model, ids, own: jax.nn.log_softmax(model(ids, own)))
    ends = [*text.starts[1:], len(text.tokens)]
    nats = 0.0
    for start, end in zip(text.starts, ends, strict=True):
        for target in range(start + 1, end):
            # The window that predicts it ends at the next multiple of the stride.
            last = -(-target // stride) * stride
            first = max(start, last - LENGTH)
            ids = np.zeros((1, LENGTH), np.int32)
            ids[0, : target - first] = text.tokens[first:target]
            own = (np.arange(LENGTH) < target - first)[None].astype(np.int32)
            logs = run(model, jnp.asarray(ids), jnp.asarray(own))
            nats -= float(logs[0, target - first - 1, text.tokens[target]])
    found = sliding_bits_per_byte(teacher, text, context=LENGTH, stride=stride, batch=3)
    np.testing.assert_allclose(found, nats / np.log(2) / text.bytes, rtol=1e-5)
