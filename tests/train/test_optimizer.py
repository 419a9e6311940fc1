from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import OptimConfig, TrainConfig
from moe_jax.train.optimizer import decay_mask, learning_rate, make_optimizer
from moe_jax.train.state import abstract_state, init_state


def flat(tree):
    return {jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(tree)}


def test_cosine_schedule_by_hand():
    rate = learning_rate(OptimConfig(learning_rate=1.0, warmup=0.1, final=0.2), 100)
    found = [float(rate(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(found, [1 / 11, 6 / 11, 1, 0.6, 0.2], atol=1e-6)


def test_wsd_schedule_by_hand():
    config = OptimConfig(learning_rate=1.0, schedule="wsd", warmup=0.1, decay=0.2, final=0.0)
    found = [float(learning_rate(config, 100)(step)) for step in (0, 5, 10, 50, 80, 90, 100)]
    np.testing.assert_allclose(found, [1 / 11, 6 / 11, 1, 1, 1, 0.5, 0], atol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 10, 600])
def test_every_update_has_a_learning_rate(schedule, steps):
    """Also the first one, and the last one where the run decays to 0."""
    for warmup in (0.0, 0.02, 0.1, 0.5):
        config = OptimConfig(learning_rate=1.0, schedule=schedule, warmup=warmup, final=0.0)
        rates = np.array([float(learning_rate(config, steps)(step)) for step in range(steps)])
        assert (rates > 0).all()
        rising = np.diff(rates[: round(warmup * steps) + 1])
        np.testing.assert_allclose(rising, rising[:1].repeat(len(rising)), atol=1e-6)


def test_a_longer_run_has_the_same_past_and_then_a_phase_of_its_own():
    config = OptimConfig(learning_rate=1.0, warmup=0.1, final=0.2)
    # Built inside a trace, as in the initialisation of a state.
    longer = jax.jit(lambda n: learning_rate(config, 100, continue_to=200)(n))
    short = learning_rate(config, 100)
    past = np.arange(100)
    np.testing.assert_allclose(longer(past), short(past), rtol=1e-6)
    found = [float(longer(step)) for step in (100, 110, 155, 200)]
    np.testing.assert_allclose(found, [0.2 + 0.8 / 11, 1, 0.6, 0.2], atol=1e-6)
    constant = OptimConfig(learning_rate=1.0, schedule="constant")
    np.testing.assert_allclose(learning_rate(constant, 100, 200)(np.arange(5, 200)), 1)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_no_warmup_starts_at_the_peak(schedule):
    rate = learning_rate(OptimConfig(learning_rate=2.0, schedule=schedule, warmup=0.0), 10)
    assert float(rate(0)) == 2.0


def test_norms_and_embedding_are_not_decayed(small_model):
    config = TrainConfig(model=replace(small_model, tied_embedding=False, vocabulary=4096))
    decayed = {k for k, v in flat(decay_mask(abstract_state(config).parameters)).items() if v}
    untouched = set(flat(abstract_state(config).parameters)) - decayed
    assert all("scale" in name or "embedding" in name for name in untouched)
    assert any("head" in name for name in decayed)
    assert any("moe" in name and "gate_up" in name for name in decayed)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_moves_and_clipping_bounds_the_gradient(small_run, optimizer):
    config = replace(small_run, optim=OptimConfig(optimizer=optimizer, warmup=0.0))
    parameters = init_state(config).parameters
    rule = make_optimizer(config.optim, 10)
    huge = jax.tree.map(lambda p: 1e3 * jnp.ones_like(p), parameters)
    updates, _ = jax.jit(rule.update)(huge, rule.init(parameters), parameters)
    for name, update in flat(updates).items():
        assert np.isfinite(update).all(), name
        assert np.abs(update).max() > 0, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_alone_shrinks_matrices_and_nothing_else(small_run, optimizer):
    optim = OptimConfig(optimizer=optimizer, learning_rate=1.0, warmup=0.0, weight_decay=0.1)
    parameters = init_state(small_run).parameters
    rule = make_optimizer(optim, 10)
    zero = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = jax.jit(rule.update)(zero, rule.init(parameters), parameters)
    for (name, update), parameter in zip(
        flat(updates).items(), jax.tree.leaves(parameters), strict=True
    ):
        spared = "scale" in name or "embedding" in name
        np.testing.assert_allclose(update, (0 if spared else -0.1) * parameter, atol=1e-7)


def test_muon_orthogonalises_each_expert_by_itself(small_run):
    config = replace(small_run, optim=OptimConfig(optimizer="muon", warmup=0.0, weight_decay=0.0))
    parameters = init_state(config).parameters
    rule = make_optimizer(config.optim, 10)
    gradients = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(0), p.shape) / 100, parameters
    )
    updates, _ = jax.jit(rule.update)(gradients, rule.init(parameters), parameters)
    down = np.asarray(updates["sparse"]["blocks"]["moe"]["down"][...])
    assert down.ndim == 4
    for matrix in down.reshape(-1, *down.shape[-2:]):
        singular = np.linalg.svd(matrix, compute_uv=False)
        # Newton-Schulz brings all singular values near one common size, not exactly to it
        assert singular.max() / singular.min() < 2.5
