from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MoEConfig, OptimConfig
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import batch_sharding, replicated
from moe_jax.train.state import init_state
from moe_jax.train.step import make_gradient, make_step
from tests.conftest import SMALL_MODEL, make_run

# Compiling is nearly all of this file's time. One run serves all tests, so that equal configs share
# their compiled step and their initial state.


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("step"), SMALL_MODEL)


@cache
def compiled_step(config):
    return jax.jit(make_step(config))


@cache
def initial_state(config):
    return jax.jit(lambda: init_state(config))()


def make_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    shape = (config.batch, config.data.length + 1 + config.model.mtp_depth)
    # Documents of uneven lengths: micro-batches differ in their number of valid targets.
    often = np.linspace(0.02, 0.5, config.batch)[:, None]
    segments = 1 + np.cumsum(rng.random(shape) < often, axis=1)
    return {
        "tokens": jnp.asarray(rng.integers(0, 256, shape), jnp.int32),
        "segments": jnp.asarray(segments, jnp.int32),
    }


def with_padding(batch):
    """The batch with the last row empty, and the one before it from its tenth token on."""
    segments = batch["segments"].at[-1].set(0).at[-2, 10:].set(0)
    return batch | {"segments": segments}


def assert_close(one, two, rtol=2e-4, atol=2e-6):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def test_the_loss_falls(small_run):
    config = replace(small_run, optim=OptimConfig(learning_rate=1e-2, warmup=0.0), steps=30)
    step, state, batch = compiled_step(config), initial_state(config), make_batch(config)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 1
    assert int(state.step) == 30


VARIANTS = {
    "plain": {},
    "means": {"moe": MoEConfig(experts=6, sequence_loss=0.1, locality_loss=0.1, z_loss=0.1)},
    "multi-token prediction": {"mtp_depth": 1},
    "rematerialised": {"mtp_depth": 1, "remat": "full"},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "every balance loss": {
        "moe": MoEConfig(
            experts=6,
            groups=3,
            groups_per_token=2,
            sequence_loss=0.1,
            expert_loss=0.1,
            device_loss=0.1,
            locality_loss=0.1,
            z_loss=0.1,
        )
    },
    "hash": {"moe": MoEConfig(experts=6, rule="hash", bias_rate=0)},
}


@pytest.mark.parametrize(
    "name", ["means", pytest.param("multi-token prediction", marks=pytest.mark.slow)]
)
def test_accumulated_micro_batches_equal_the_whole_batch(small_run, name):
    """Not the average of averages: every valid target and every token counts the same, and one
    micro-batch has neither."""
    config = replace(small_run, model=replace(small_run.model, **VARIANTS[name]))
    split = replace(config, optim=OptimConfig(accumulation=4))
    state, batch = initial_state(config), with_padding(make_batch(config))
    (whole, gradient), (parts, accumulated) = (
        jax.jit(make_gradient(c))(state.parameters, state.router, batch, jax.random.key(0))
        for c in (config, split)
    )
    assert_close(whole, parts)
    assert_close(gradient, accumulated)


@pytest.mark.slow
def test_expert_level_losses_are_the_mean_of_those_of_the_micro_batches(small_run):
    """By their numbers of tokens. Each has its own load, as the text of expert_loss says."""
    moe = MoEConfig(experts=6, groups=2, groups_per_token=2, sequence_loss=0.0)
    moe = replace(moe, expert_loss=0.1, device_loss=0.1)
    config = replace(small_run, model=replace(small_run.model, moe=moe))
    split = replace(config, optim=OptimConfig(accumulation=2))
    state, batch = initial_state(config), with_padding(make_batch(config))
    key = jax.random.key(0)
    (_, parts), _ = jax.jit(make_gradient(split))(state.parameters, state.router, batch, key)
    alone = jax.jit(make_gradient(config))
    means = []
    tokens = []
    for first in range(2):  # strided micro-batches
        own = {name: rows[first::2] for name, rows in batch.items()}
        means.append(alone(state.parameters, state.router, own, key)[0][1].balance)
        tokens.append((own["segments"][:, : config.data.length] != 0).sum())
    assert tokens[0] != tokens[1]
    np.testing.assert_allclose(parts.balance, np.average(means, weights=tokens), rtol=1e-5)
    (_, whole), _ = alone(state.parameters, state.router, batch, key)
    assert abs(float(whole.balance - parts.balance)) > 1e-6 * float(whole.balance)


@pytest.mark.parametrize(
    ("name", "accumulation"),
    [
        pytest.param("rematerialised", 2, marks=pytest.mark.slow),
        pytest.param("bfloat16", 1, marks=pytest.mark.slow),
        pytest.param("every balance loss", 1, marks=pytest.mark.slow),
        pytest.param("hash", 1, marks=pytest.mark.slow),
    ],
)
def test_two_devices_equal_one(small_run, name, accumulation):
    optim = OptimConfig(accumulation=accumulation)
    model = replace(small_run.model, **VARIANTS[name])
    config = replace(small_run, model=model, optim=optim)
    state, batch = initial_state(config), with_padding(make_batch(config))
    gradient = make_gradient(config)
    alone = jax.jit(gradient)(state.parameters, state.router, batch, jax.random.key(0))
    mesh = make_mesh(devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        parameters, router = jax.device_put((state.parameters, state.router), replicated(mesh))
        spread = jax.device_put(batch, batch_sharding(mesh))
        shared = jax.jit(gradient)(parameters, router, spread, jax.random.key(0))
    if model.compute_dtype == "bfloat16":  # sums of bfloat16 in another order
        assert_close(alone, shared, rtol=0.1, atol=0.02)
    else:
        assert_close(alone, shared)


@pytest.mark.slow
def test_noise_differs_between_devices_and_steps(small_run):
    moe = MoEConfig(experts=6, gate="softmax", bias_rate=0, rule="noisy_top_k")
    config = replace(small_run, model=replace(small_run.model, moe=moe))
    state, batch = initial_state(config), make_batch(config)
    batch = jax.tree.map(lambda leaf: jnp.tile(leaf[:1], (len(leaf), 1)), batch)
    mesh = make_mesh(devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        state = jax.device_put(state, replicated(mesh))
        step = jax.jit(make_step(config))
        _, first = step(state, jax.device_put(batch, batch_sharding(mesh)))
        _, second = step(
            state._replace(step=state.step + 1), jax.device_put(batch, batch_sharding(mesh))
        )
    assert np.isfinite(first.loss)
    assert first.loss != second.loss, "another step draws other noise"
    loads = np.stack([m.stats["sparse"].load for m in (first, second)])
    assert (loads % 2).any(), "equal halves of the batch are routed differently"


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_a_non_finite_update_changes_nothing_and_is_counted(small_run, poison):
    state, batch = initial_state(small_run), make_batch(small_run)
    poisoned = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(poison), state.parameters)
    bad = state._replace(parameters=poisoned)
    step = compiled_step(small_run)
    after, metrics = step(bad, batch)
    assert not np.isfinite(metrics.loss)
    for part in ("parameters", "optimizer", "router", "updates"):
        assert_close(getattr(after, part), getattr(bad, part), rtol=0, atol=0)
    assert [int(after.step), int(after.skipped), int(metrics.skipped)] == [1, 1, 1]
    again, _ = step(after, batch)
    assert int(again.skipped) == 2
    healed, metrics = step(again._replace(parameters=state.parameters), batch)
    assert [int(healed.skipped), int(healed.updates)] == [0, 1]
    assert np.isfinite(metrics.loss)


def test_the_router_bias_follows_the_load_and_freezes(small_run):
    moe = replace(small_run.model.moe, bias_rate=0.01, bias_until=0.5)
    config = replace(small_run, model=replace(small_run.model, moe=moe), steps=4)
    step, state, batch = compiled_step(config), initial_state(config), make_batch(config)
    biases = []
    for _ in range(4):
        state, metrics = step(state, batch)
        biases.append(np.asarray(jax.tree.leaves(state.router)[0]))
        load = np.asarray(metrics.stats["sparse"].load)
        if len(biases) == 1:
            expected = 0.01 * np.sign(load.mean(-1, keepdims=True) - load)
            np.testing.assert_allclose(biases[0], expected, rtol=1e-6)
    assert np.any(biases[1] != biases[0])
    np.testing.assert_array_equal(biases[2], biases[1])
    np.testing.assert_array_equal(biases[3], biases[1])


def test_the_same_seed_gives_the_same_bits(small_run):
    runs = []
    for _ in range(2):
        # Nothing is shared here: the draws and the program are made anew.
        state, batch = init_state(small_run), make_batch(small_run)
        step = jax.jit(make_step(small_run))
        for _ in range(3):
            state, metrics = step(state, batch)
        runs.append((state, metrics))
    assert_close(*runs, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(experts=4, gate="softmax", bias_rate=0.0, z_loss=1e-3),
        pytest.param(MoEConfig(experts=4, groups=2, shared_experts=0), marks=pytest.mark.slow),
    ],
)
def test_other_gates_train(small_run, moe):
    config = replace(small_run, model=replace(small_run.model, moe=moe))
    _, metrics = jax.jit(make_step(config))(initial_state(config), make_batch(config))
    assert np.isfinite(metrics.loss)
    assert metrics.stats["sparse"].load.sum() == 2 * config.batch * config.data.length
