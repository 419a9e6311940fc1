from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import MoEConfig
from moe_jax.moe.balance import update_bias
from moe_jax.moe.layer import Gate, Layer, moe_layer
from moe_jax.moe.module import MoE
from moe_jax.moe.rules import RoutingContext
from tests import oracle

BASE = MoEConfig(experts=6, experts_per_token=2, expert_hidden=7, scale=1.5)
CONFIGS = {
    "sigmoid": BASE,
    "softmax": replace(BASE, gate="softmax", normalise=False, bias_rate=0),
    "groups": replace(BASE, groups=3, groups_per_token=2),
    "nodes": replace(BASE, groups=3, groups_per_token=1, group_score="node"),
    "reference": replace(BASE, implementation="reference"),
    "triton": replace(BASE, implementation="triton"),
    "K = E": replace(BASE, experts_per_token=6),
    "E = 1": replace(BASE, experts=1, experts_per_token=1),
}


def make_inputs(c: MoEConfig, batch=2, length=9, width=5, dtype=np.float64):
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)  # noqa: E731
    return (
        draw(batch, length, width),
        draw(width, c.experts),
        0.2 * draw(c.experts),
        draw(c.experts, width, 2 * c.expert_hidden),
        draw(c.experts, c.expert_hidden, width),
    )


def run(x, router, bias, gate_up, down, c):
    """((outputs, experts), statistics) of the layer."""
    x, router, bias, gate_up, down = (jnp.asarray(a) for a in (x, router, bias, gate_up, down))
    layer = Layer(Gate(router, bias), gate_up, down)
    out, choice = jax.jit(moe_layer, static_argnums=2)(x, layer, c)
    return (out, choice.stats.experts), choice.stats


def run_oracle(inputs, c: MoEConfig):
    x, *parameters = inputs
    out, load = oracle.moe(x.reshape(-1, x.shape[-1]), *parameters, c)
    return out.reshape(x.shape), load


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_equals_the_per_token_loop(name):
    c = CONFIGS[name]
    inputs = make_inputs(c, dtype=np.float32)
    (out, _), stats = jax.jit(run, static_argnums=5)(*inputs, c)
    expected, load = run_oracle(inputs, c)
    # float32 sums of width 5 and 7 against float64
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(stats.load, load)
    assert stats.dropped == 0


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "groups", "reference"])
def test_every_gradient_equals_finite_differences_of_the_loop(name):
    c = CONFIGS[name]
    inputs = make_inputs(c, batch=1, length=4, width=3)
    direction = np.random.default_rng(4).normal(size=inputs[0].shape)

    def objective(*arrays):
        return (run(*arrays, c)[0][0] * direction).sum()

    differentiated = (0, 1, 3, 4)  # not the bias: it has no gradient
    floats = [jnp.asarray(a, jnp.float32) for a in inputs]
    gradients = jax.jit(jax.grad(objective, differentiated))(*floats)
    step = 1e-5
    for index, gradient in zip(differentiated, gradients, strict=True):
        numeric = np.zeros(inputs[index].shape)
        for at in np.ndindex(numeric.shape):
            sides = []
            for sign in (1, -1):
                moved = [a.copy() for a in inputs]
                moved[index][at] += sign * step
                sides.append((run_oracle(moved, c)[0] * direction).sum())
            numeric[at] = (sides[0] - sides[1]) / (2 * step)
        # differences in float64 are exact to 1e-8 here; the rest is float32
        np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_all_tokens_to_one_expert(tokens):
    c = replace(BASE, experts_per_token=1)
    x, router, _, gate_up, down = make_inputs(c, batch=1, length=tokens, dtype=np.float32)
    inputs = (x, router, 100 * np.eye(6, dtype=np.float32)[4], gate_up, down)
    (out, experts), stats = run(*inputs, c)
    assert np.all(experts == 4)
    np.testing.assert_allclose(out, run_oracle(inputs, c)[0], rtol=2e-5, atol=2e-5)
    assert stats.load.tolist() == [0, 0, 0, 0, tokens, 0]


def test_permuting_tokens_permutes_outputs():
    x, *parameters = make_inputs(BASE, batch=1, length=30, dtype=np.float32)
    order = np.random.default_rng(0).permutation(30)
    (plain, _), _ = run(x, *parameters, BASE)
    (permuted, _), _ = run(x[:, order], *parameters, BASE)
    np.testing.assert_allclose(permuted, plain[:, order], rtol=1e-5, atol=1e-6)


def test_nan_logits_make_the_token_nan_and_no_other():
    x, *parameters = make_inputs(BASE, batch=1, length=5, dtype=np.float32)
    x[0, 2] = np.nan
    (out, _), _ = run(x, *parameters, BASE)
    assert np.isnan(out[0, 2]).all()
    assert np.isfinite(np.delete(out[0], 2, axis=0)).all()


def test_bitwise_the_same_from_run_to_run():
    inputs = make_inputs(BASE, length=64, dtype=np.float32)
    layer = jax.jit(jax.grad(lambda *a: run(*a, BASE)[0][0].sum(), argnums=(0, 1, 3, 4)))
    first, second = layer(*inputs), layer(*inputs)
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "name", ["sequence_loss", "expert_loss", "device_loss", "locality_loss", "z_loss"]
)
def test_a_configured_loss_changes_the_router_gradient(name):
    inputs = make_inputs(BASE, dtype=np.float32)

    def gradient(c):
        return jax.grad(lambda r: run(inputs[0], r, *inputs[2:], c)[1].loss)(inputs[1])

    off = replace(BASE, groups=3, groups_per_token=3, sequence_loss=0.0)
    assert not np.any(gradient(off))
    assert np.abs(gradient(replace(off, **{name: 0.1}))).max() > 1e-5


def test_a_capacity_drops_and_counts():
    c = replace(BASE, experts_per_token=1, capacity_factor=1.0)
    x, router, _, gate_up, down = make_inputs(c, batch=1, length=12, dtype=np.float32)
    hot = 100 * np.eye(6, dtype=np.float32)[4]
    (out, _), stats = run(x, router, hot, gate_up, down, c)
    free = replace(c, capacity_factor=0.0)
    (whole, _), _ = run(x, router, hot, gate_up, down, free)
    assert (int(stats.dropped), stats.load.tolist()) == (10, [0, 0, 0, 0, 12, 0])
    np.testing.assert_array_equal(out[0, :2], whole[0, :2])
    assert not np.any(out[0, 2:]), "the first tokens are kept, the others get nothing"


@pytest.mark.parametrize("rule", ["noisy_top_k", "expert_choice", "token_rounding", "hash"])
def test_every_rule_runs_and_trains(rule):
    c = MoEConfig(
        experts=6,
        experts_per_token=2,
        expert_hidden=7,
        gate="softmax",
        bias_rate=0,
        rule=rule,
        allow_acausal=True,
        rounding_tile=4,
    )
    layer = MoE(5, c, std=1.0, out_std=1.0, dtype=jnp.dtype("float32"), key=jax.random.key(0))
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(1), (2, 9, 5))
    context = RoutingContext(jnp.arange(18).reshape(2, 9), jax.random.key(2))

    def objective(parameters):
        out, stats = nnx.merge(graph, parameters, rest)(x, context)
        return (out**2).sum(), stats

    gradients, stats = jax.jit(jax.grad(objective, has_aux=True))(parameters)
    assert stats.load.sum() > 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        learns = rule != "hash" or "router" not in str(path)
        assert np.isfinite(leaf).all()
        assert (np.abs(leaf).max() > 0) == learns, path


def test_bias_updates_balance_a_skewed_router():
    c = replace(BASE, experts=8, experts_per_token=2)
    x, router, bias, gate_up, down = make_inputs(c, batch=4, length=64, dtype=np.float32)
    router[:, 0] *= 0.01
    x = x + 1.0
    router[:, 1] += 2.0  # every token prefers expert 1
    bias = jnp.zeros(8)
    gate_up, down = jnp.asarray(gate_up), jnp.asarray(down)
    layer = jax.jit(lambda b: run(x, router, b, gate_up, down, c)[1].load)
    before = layer(bias)
    for rate in [0.01] * 300 + [0.001] * 300:
        bias = update_bias(bias, layer(bias), rate)
    after = layer(bias)
    assert before.max() / before.mean() > 3
    assert after.max() / after.mean() < 1.3
