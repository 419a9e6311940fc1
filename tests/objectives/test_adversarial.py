"""Objectives with an adversary: what they add, and that it is nothing where it must be nothing."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moe_jax.adversarial.generative import make_discriminator
from moe_jax.base.errors import UserError
from moe_jax.config import DistillConfig, ModelConfig, OptimConfig
from moe_jax.data.batches import shifted_targets
from moe_jax.model.abstract import graph_of
from moe_jax.model.transformer import Transformer
from moe_jax.objectives import adversarial as ours
from moe_jax.objectives import policy
from moe_jax.objectives.adversarial import PerturbConfig
from moe_jax.objectives.base import OWN, valid_targets
from moe_jax.objectives.distillation import online_objective
from moe_jax.train.state import init_state
from moe_jax.train.step import make_gradient
from tests.objectives.test_distillation import states_of
from tests.train.test_step import assert_close, make_batch


@pytest.fixture
def config(small_run):
    model = replace(small_run.model, layers=1, dense_layers=1, init_std=0.3)
    return replace(small_run, model=model, optim=OptimConfig(warmup=0.0), steps=30)


@pytest.fixture
def setting(config):
    """(state, batch, key, model config, its states)"""
    state = init_state(config)
    return state, make_batch(config), jax.random.key(0), config.model


def found(config, objective, setting, *more):
    state, batch, key, _ = setting
    gradient = jax.jit(make_gradient(config, objective))
    return gradient(state.parameters, state.router, batch, key, *more)


def test_weights_of_one_are_the_plain_loss_and_zeros_drop_sequences(config, setting):
    state, batch, key, model = setting
    rows = len(batch["tokens"])
    plain = jax.jit(make_gradient(config))(state.parameters, state.router, batch, key)
    ones = {**batch, ours.WEIGHT: jnp.ones(rows)}
    same = found(config, ours.weighted, (state, ones, key, model))
    np.testing.assert_allclose(same[0][0], plain[0][0], rtol=1e-5)
    assert_close(same[1], plain[1], rtol=1e-3, atol=1e-5)
    nats = jax.jit(lambda s, b: ours.sequence_nats(merged(model, s), b, config.data.length))
    each = nats((state.parameters, state.router), batch)
    count = shifted_targets(batch["tokens"], batch["segments"], config.data.length)[1].sum(-1)
    weights = jnp.arange(rows).astype(jnp.float32)
    weighed = found(config, ours.weighted, (state, {**batch, ours.WEIGHT: weights}, key, model))
    expected = (each * count * weights).sum() / valid_targets(batch, config.data.length)
    np.testing.assert_allclose(weighed[0][0], expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["weighted", "smoothed", "perturbed"])
def test_every_objective_has_multi_token_prediction(config, name):
    """Its loss and its gradient are those of the plain objective, whatever the main loss is."""
    config = replace(config, model=replace(config.model, mtp_depth=1))
    state = init_state(config)
    batch = make_batch(config)
    batch |= {ours.WEIGHT: jnp.ones(len(batch["tokens"]))}
    objective, operands = {
        "weighted": (ours.weighted, ()),
        "smoothed": (ours.smoothed_objective(0.3), ()),
        "perturbed": (
            ours.perturbed_objective(PerturbConfig(kind="none"), config.model),
            (states_of(config.model, 5),),
        ),
    }[name]
    key = jax.random.key(0)
    model = state.model_states()
    (_, plain), plain_gradient = jax.jit(make_gradient(config))(*model, batch, key)
    (_, losses), gradient = jax.jit(make_gradient(config, objective))(*model, batch, key, *operands)
    assert losses.mtp > 0
    np.testing.assert_allclose(losses.mtp, plain.mtp, rtol=1e-5)
    # The modules of multi-token prediction are reached by its loss alone.
    assert_close(gradient["mtp"], plain_gradient["mtp"], rtol=1e-3, atol=1e-6)


def merged(model: ModelConfig, states) -> Transformer:
    return nnx.merge(graph_of(model), *states)


def test_without_a_perturbation_it_is_distillation(config, setting):
    *_, model = setting
    teacher = states_of(model, 5)
    settings = PerturbConfig(kind="none", alpha=0.7)
    mine = found(config, ours.perturbed_objective(settings, model), setting, teacher)
    theirs = found(config, online_objective(DistillConfig(alpha=0.7), [model]), setting, [teacher])
    np.testing.assert_allclose(mine[0][0], theirs[0][0], rtol=1e-5)
    assert_close(mine[1], theirs[1], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_what_is_added_is_larger_for_the_adversary(config, setting):
    """Same size, same text: the adversarial shift and swaps hurt more than the random ones."""
    state, batch, key, model = setting
    length, teacher = config.data.length, states_of(model, 5)

    def added(kind):
        objective = ours.perturbed_objective(PerturbConfig(kind=kind), model)
        student = merged(model, (state.parameters, state.router))
        part = base.whole_batch(batch, length, 0, None)

        @jax.jit
        def call(key):
            reading = base.forward(student, part._replace(key=key), length)
            return objective(reading, teacher).other

        return float(np.mean([call(jax.random.fold_in(key, k)) for k in range(4)]))

    base = added("none")
    assert added("virtual") - base > 2 * (added("random") - base) > 0
    assert added("swaps") > max(added("random_swaps"), 2 * base)


@pytest.mark.slow
def test_label_smoothing_of_nothing_is_the_plain_loss(config, setting):
    state, batch, key, _ = setting
    plain = jax.jit(make_gradient(config))(state.parameters, state.router, batch, key)
    none = found(config, ours.smoothed_objective(0.0), setting)
    np.testing.assert_allclose(none[0][0], plain[0][0], rtol=1e-5)
    some = found(config, ours.smoothed_objective(0.3), setting)
    assert abs(float(some[0][0] - plain[0][0])) > 1e-4
    np.testing.assert_allclose(some[0][1].cross_entropy, plain[0][1].cross_entropy, rtol=1e-5)


def policy_setting(setting, advantage):
    state, batch, key, model = setting
    length = batch["tokens"].shape[1] - 1
    own = jnp.broadcast_to(jnp.arange(length) >= 5, (len(batch["tokens"]), length))
    segments = jnp.ones_like(batch["segments"])
    more = {"segments": segments, OWN: own, policy.ADVANTAGE: jnp.asarray(advantage)}
    return state, {**batch, **more}, key, model


def test_an_update_makes_rewarded_text_likelier(config, setting):
    """Down the gradient, the log-probability of what was rewarded rises and of the rest falls."""
    rows = len(setting[1]["tokens"])
    sign = np.where(np.arange(rows) % 2 == 0, 1.0, -1.0).astype(np.float32)
    setting = policy_setting(setting, sign)
    state, batch, _, model = setting
    start = (state.parameters, state.router)
    objective = policy.policy_objective(policy.GenerativeConfig(anchor=0.0, temperature=1.0), model)
    gradient = found(config, objective, setting, start)[1]
    nats = jax.jit(lambda p: ours.sequence_nats(merged(model, (p, state.router)), batch, length))
    length = config.data.length
    moved = jax.tree.map(lambda p, g: p - 0.03 * g, state.parameters, gradient)
    change = -(nats(moved) - nats(state.parameters))
    assert float((change * sign).mean()) > 0


def test_the_anchor_is_zero_at_the_start_and_pulls_back(config, setting):
    """No reward: the anchor alone has no value and no gradient at the start, and both elsewhere."""
    *_, model = setting
    setting = policy_setting(setting, np.zeros(len(setting[1]["tokens"]), np.float32))
    objective = policy.policy_objective(policy.GenerativeConfig(anchor=1.0, temperature=1.0), model)
    state = setting[0]
    (loss, _), gradient = found(config, objective, setting, (state.parameters, state.router))
    assert abs(float(loss)) < 1e-5
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-5
    (loss, _), gradient = found(config, objective, setting, states_of(model, 5))
    assert float(loss) > 1e-3
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-4


def test_a_discriminator_learns_to_tell_texts_apart(config, setting):
    state, *_, model = setting
    graph, parameters, router = make_discriminator(model, state.parameters, state.router, seed=0)
    optimizer = optax.adam(3e-3)
    step = jax.jit(policy.make_discriminator_step(graph, optimizer))
    judge = policy.DiscriminatorState(parameters, router, optimizer.init(parameters))
    rng, seen = np.random.default_rng(0), []
    for _ in range(30):
        teacher = jnp.asarray(rng.integers(0, 20, (8, 12)))
        student = jnp.asarray(rng.integers(10, 30, (8, 12)))
        judge, loss, right = step(judge, teacher, student)
        seen.append((float(loss), float(right)))
    assert np.mean([right for _, right in seen[-5:]]) > 0.95
    assert seen[-1][0] < 0.2 < seen[0][0]


def test_bad_settings_are_one_line():
    cases = [
        (lambda: PerturbConfig(size=0.0), "perturb.size is 0"),
        (lambda: PerturbConfig(swap_vocabulary=1), "needs another token"),
        (lambda: policy.GenerativeConfig(group=1), "generative.group is 1"),
        (lambda: ours.smoothed_objective(1.0), "epsilon is 1"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
