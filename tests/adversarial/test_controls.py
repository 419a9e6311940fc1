"""Teachers that know nothing, against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.adversarial import controls
from moe_jax.distill.chunked import LazyLogits, vocabulary_chunks
from tests.distill.formulas import softmax

N, D, V = 5, 4, 23
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (
    LazyLogits(*(jnp.asarray(RNG.normal(size=(rows, D)), jnp.float32) for rows in (N, V)))
    for _ in range(2)
)
TARGETS = jnp.asarray(RNG.integers(0, V, N))


def log_probabilities(of):
    return np.log(softmax(np.asarray(of.hidden) @ np.asarray(of.table).T))


@pytest.mark.parametrize("chunk", [7, 4096])
def test_label_smoothing(chunk):
    columns = vocabulary_chunks([STUDENT], size=chunk)
    log_q = log_probabilities(STUDENT)
    target = 0.8 * np.eye(V)[TARGETS] + 0.2 / V
    found = controls.label_smoothing(STUDENT, TARGETS, columns, 0.2)
    np.testing.assert_allclose(found, -(target * log_q).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("chunk", [7, 4096])
def test_best_guess_and_uniform(chunk):
    columns = vocabulary_chunks([STUDENT, TEACHER], size=chunk)
    p, log_q = np.exp(log_probabilities(TEACHER)), log_probabilities(STUDENT)
    token, p_max = controls.best_guess(TEACHER, columns)
    np.testing.assert_array_equal(token, p.argmax(-1))
    np.testing.assert_allclose(p_max, p.max(-1), rtol=1e-4)
    target = np.repeat((1 - p.max(-1, keepdims=True)) / (V - 1), V, axis=-1)
    np.put_along_axis(target, p.argmax(-1)[:, None], p.max(-1, keepdims=True), -1)
    found = controls.guess_and_uniform(STUDENT, TEACHER, columns)
    np.testing.assert_allclose(found, -(target * log_q).sum(-1), rtol=1e-4)
