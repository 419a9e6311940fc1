"""Steps with a teacher: from a cache, online, and on the student's own text."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.base.errors import UserError
from moe_jax.config import OptimConfig
from moe_jax.model.abstract import graph_of
from moe_jax.model.transformer import Transformer
from moe_jax.moe.module import RouterBias
from moe_jax.objectives.distillation import (
    OWN,
    DistillConfig,
    cached_objective,
    is_on_policy,
    online_objective,
    own_batch,
    text_batch,
)
from moe_jax.train.state import init_state
from moe_jax.train.step import make_gradient, make_step
from tests.train.test_step import assert_close, make_batch

CHUNKED = DistillConfig(chunk=100)


def states_of(model, seed):
    built = Transformer(model, key=jax.random.key(seed))
    _, parameters, router = nnx.split(built, nnx.Param, RouterBias)
    return parameters, router


def gradient_of(config, objective):
    return jax.jit(make_gradient(config, objective))


@pytest.fixture
def config(small_run):
    return replace(small_run, optim=OptimConfig(learning_rate=1e-2, warmup=0.0), steps=30)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1])
def test_without_a_teacher_it_is_the_plain_loss(config, depth):
    """alpha = 0: the same loss and gradient as training without distillation, multi-token
    prediction included."""
    config = replace(config, model=replace(config.model, mtp_depth=depth))
    state, batch, key = init_state(config), make_batch(config), jax.random.key(0)
    model = config.model
    online = online_objective(replace(CHUNKED, alpha=0.0), [model])
    plain = jax.jit(make_gradient(config))
    (total, _), expected = plain(state.parameters, state.router, batch, key)
    taught = gradient_of(config, online)
    states = [states_of(model, 5)]
    (found, parts), gradient = taught(state.parameters, state.router, batch, key, states)
    np.testing.assert_allclose(found, total, rtol=1e-5)
    np.testing.assert_allclose(parts.distillation, parts.cross_entropy, rtol=1e-6)
    assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(config):
    config = replace(
        config, model=replace(config.model, moe=replace(config.model.moe, sequence_loss=0.0))
    )
    state, batch = init_state(config), make_batch(config)
    taught = gradient_of(config, online_objective(CHUNKED, [config.model]))
    states = [(state.parameters, state.router)]
    (_, parts), gradient = taught(state.parameters, state.router, batch, jax.random.key(0), states)
    assert abs(float(parts.distillation)) < 1e-5
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-5
    other = [states_of(config.model, 5)]
    (_, parts), gradient = taught(state.parameters, state.router, batch, jax.random.key(0), other)
    assert float(parts.distillation) > 1e-4
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-5


@pytest.mark.slow
def test_micro_batches_equal_the_whole_batch(config):
    """The normaliser is the whole batch's number of targets, with a teacher as without."""
    state, batch = init_state(config), make_batch(config)
    objective = online_objective(replace(CHUNKED, alpha=0.5), [config.model])
    split = replace(config, optim=OptimConfig(accumulation=4))
    states = [states_of(config.model, 5)]
    whole, parts = (
        gradient_of(c, objective)(state.parameters, state.router, batch, jax.random.key(0), states)
        for c in (config, split)
    )
    assert_close(whole[0], parts[0])
    assert_close(whole[1], parts[1])


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.slow) for kind in ("sampled", "online", "top_k")],
)
def test_the_student_approaches_its_teacher(config, kind):
    model = config.model
    teacher, batch = states_of(replace(model, init_std=0.3), 5), make_batch(config)
    length = config.data.length
    tokens, segments = batch["tokens"][:, :length], batch["segments"][:, :length]
    logits = nnx.merge(graph_of(model), *teacher)(tokens, segments)
    batch, more = dict(batch), []
    if kind == "online":
        objective, more = online_objective(CHUNKED, [model]), [[teacher]]
    else:
        objective = cached_objective(CHUNKED)
        log_p, best = jax.lax.top_k(jax.nn.log_softmax(logits), 20)
        # The same draws in all 30 steps: with few of them the student would learn their noise.
        drawn = jax.random.categorical(jax.random.key(1), logits, shape=(200, *logits.shape[:2]))
        batch["teacher_tokens"] = best if kind == "top_k" else jnp.moveaxis(drawn, 0, -1)
        if kind == "top_k":
            batch["teacher_log_p"] = log_p
    step, state = jax.jit(make_step(config, objective)), init_state(config)
    graph = graph_of(model)

    def apart(state):
        student = nnx.merge(graph, state.parameters, state.router)(tokens, segments)
        log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(student)
        return float(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1).mean())

    before = apart(state)
    for _ in range(30):
        state, metrics = step(state, batch, *more)
    assert np.isfinite(metrics.distillation)
    assert apart(state) < 0.7 * before


def test_the_students_own_text(config):
    settings = replace(CHUNKED, alpha=0.5, prompt=10)
    model, state = config.model, init_state(config)
    batch = make_batch(config)
    states = (state.parameters, state.router)
    own = own_batch(settings, model, states, batch, state.step_key(), vocabulary=256)
    assert own["tokens"].shape == batch["tokens"].shape
    np.testing.assert_array_equal(own["tokens"][:, :10], batch["tokens"][:, :10])
    assert (own["tokens"][:, 10:] != batch["tokens"][:, 10:]).any()
    assert own["tokens"].max() < 256
    assert not own[OWN][:, :9].any()  # position 8 predicts token 9, the last of the prompt
    assert own[OWN][:, 9:].all()
    # One compiled step takes both kinds of batch.
    step = jax.jit(make_step(config, online_objective(settings, [model])))
    teacher = [states_of(model, 5)]
    state, first = step(state, text_batch(batch), teacher)
    state, second = step(state, own, teacher)
    assert step._cache_size() == 1
    assert np.isfinite([first.distillation, second.distillation]).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_from_a_sampled_cache_is_its_formula(config, temperature):
    """(1 - a) CE + a t² mean_k -log q_t(v_k), straight from the logits. At temperature 1 both parts
    share the normaliser, at others they must not."""
    state, batch = init_state(config), make_batch(config)
    length, model = config.data.length, config.model
    drawn = np.random.default_rng(1).integers(0, 256, (config.batch, length, 4))
    settings = replace(CHUNKED, alpha=0.25, temperature=temperature)
    taught = jax.jit(make_gradient(config, cached_objective(settings)))
    beside = batch | {"teacher_tokens": jnp.asarray(drawn)}
    (_, parts), _ = taught(state.parameters, state.router, beside, jax.random.key(0))
    tokens, segments = batch["tokens"], batch["segments"]
    built = nnx.merge(graph_of(model), state.parameters, state.router)
    logits = built(tokens[:, :length], segments[:, :length])
    valid = np.asarray(segments[:, 1:] == segments[:, :-1])

    def mean(log_q, chosen):
        picked = np.take_along_axis(np.asarray(log_q), np.asarray(chosen), -1).mean(-1)
        return -picked[valid].mean()

    plain = mean(jax.nn.log_softmax(logits), tokens[:, 1:, None])
    soft = mean(jax.nn.log_softmax(logits / temperature), drawn)
    np.testing.assert_allclose(parts.cross_entropy, plain, rtol=1e-5)
    expected = 0.75 * plain + 0.25 * temperature**2 * soft
    np.testing.assert_allclose(parts.distillation, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0, 1])
def test_own_tokens_have_no_cross_entropy(config, depth):
    """The gradient of a batch that is all the student's own is alpha times the divergence's."""
    config = replace(config, model=replace(config.model, mtp_depth=depth))
    state, batch, key = init_state(config), make_batch(config), jax.random.key(0)
    model = config.model
    own = {**batch, OWN: jnp.ones((config.batch, config.data.length + depth), bool)}
    states = [states_of(model, 5)]

    def loss(alpha, batch):
        objective = online_objective(replace(CHUNKED, alpha=alpha), [model])
        (_, parts), _ = gradient_of(config, objective)(
            state.parameters, state.router, batch, key, states
        )
        return float(parts.cross_entropy + parts.mtp), float(parts.distillation)

    cross_entropy, half = loss(0.5, own)
    assert cross_entropy == 0
    np.testing.assert_allclose(half, 0.5 * loss(1.0, batch)[1], rtol=1e-5)


def test_lambda_is_a_rate_that_repeats():
    chosen = [is_on_policy(replace(CHUNKED, on_policy=0.3), 7, step) for step in range(200)]
    assert 0.2 < np.mean(chosen) < 0.4
    assert chosen[:20] == [is_on_policy(replace(CHUNKED, on_policy=0.3), 7, s) for s in range(20)]
    assert not any(is_on_policy(CHUNKED, 7, step) for step in range(20))


def test_bad_settings(config):
    for change, message in [
        ({"alpha": 2}, "distill.alpha is 2"),
        ({"kind": "backward"}, "'backward': use one of forward"),
        ({"temperature": 0}, "distill.temperature is 0"),
        ({"on_policy": -1}, "distill.on_policy is -1"),
    ]:
        with pytest.raises(UserError, match=message):
            replace(CHUNKED, **change)
    settings, model = replace(CHUNKED, prompt=500), config.model
    state, batch = init_state(config), make_batch(config)
    states = (state.parameters, state.router)
    with pytest.raises(UserError, match="leaves nothing"):
        own_batch(settings, model, states, batch, state.step_key(), vocabulary=256)
