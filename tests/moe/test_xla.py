"""The fast implementation against the reference, where the loop has nothing, something and all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe import reference, xla
from moe_jax.moe.plan import make_plan

E, K, D, F = 12, 3, 10, 6
NAMES = ("out", "x", "weights", "gate_up", "down")


def draw(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_experts(tokens: int, skew: float = 0.0, seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).gumbel(size=(tokens, E))
    scores[:, 0] += skew
    return np.argsort(-scores, axis=1)[:, :K].astype(np.int32)


def half_on_one(tokens: int) -> np.ndarray:
    experts = np.random.default_rng(0).integers(0, E, (tokens, K)).astype(np.int32)
    experts.ravel()[::2] = 7
    return experts


ROUTES = {
    "T = 1": random_experts(1),
    "decoding: every row in the loop": random_experts(2),
    "balanced": random_experts(64),
    "not a power of two": random_experts(83),
    "a hot expert": random_experts(100, skew=3.0),
    "several turns for one expert": np.full((400, K), 4, np.int32),
    "half of all rows on one expert": half_on_one(90),
    "experts without a token": random_experts(50) // 4 * 4,
}


@partial(jax.jit, static_argnums=(0, 2, 3))
def results(mixture, experts, capacity=None, dtype=jnp.float32):
    """The output and every gradient, by name."""
    tokens = len(experts)
    arrays = draw((tokens, D), 1), draw((tokens, K), 2), draw((E, D, 2 * F), 3), draw((E, F, D), 4)
    x, weights, gate_up, down = (a.astype(dtype) for a in arrays)
    plan = make_plan(experts, E, capacity)
    out, pull = jax.vjp(lambda *a: mixture(*a, plan), x, weights.astype(jnp.float32), gate_up, down)
    return dict(zip(NAMES, (out, *pull(draw((tokens, D), 5).astype(dtype))), strict=True))


@pytest.mark.parametrize(
    ("name", "capacity"), [*((name, None) for name in ROUTES), ("a hot expert", 30), ("T = 1", 1)]
)
def test_equals_the_reference_forward_and_every_gradient(name, capacity):
    expected = results(reference.mixture, ROUTES[name], capacity)
    found = results(xla.mixture, ROUTES[name], capacity)
    for key in NAMES:
        # the same float32 sums in another order: up to 300 rows of an expert
        np.testing.assert_allclose(
            found[key], expected[key], rtol=1e-4, atol=1e-4, err_msg=f"{key}, {name}"
        )


def test_the_cases_reach_the_batch_the_loop_and_both():
    shares = {name: xla.batch_share(e.size, E, len(e)) for name, e in ROUTES.items()}
    overflow = {
        name: (np.bincount(e.ravel(), minlength=E) > shares[name]).any()
        for name, e in ROUTES.items()
    }
    assert shares["T = 1"] == 0
    assert shares["balanced"] > 0
    assert overflow["a hot expert"]
    sizes = xla.turn_sizes(shares["several turns for one expert"], 400)
    assert len(sizes) == 2
    hot = 1200 - shares["several turns for one expert"]
    assert hot > 2 * sizes[0] + sizes[1], "several turns of both sizes"


def test_bfloat16_is_the_reference_but_for_rounding():
    expected = results(reference.mixture, ROUTES["a hot expert"], dtype=jnp.float32)
    found = results(xla.mixture, ROUTES["a hot expert"], dtype=jnp.bfloat16)
    for key in NAMES:
        wanted = np.asarray(expected[key])
        error = np.abs(np.asarray(found[key], np.float32) - wanted)
        # 8 bits of mantissa through three products: the metric of kernels/README.md
        scale = np.maximum(np.sqrt((wanted**2).mean()), np.abs(wanted))
        assert (error / scale).max() < 5e-2, key


def test_an_expert_of_many_turns_is_not_rounded_in_each_of_them():
    """12,000 rows of one expert in bfloat16, in about 47 turns. Rounded after each turn, the errors
    of both matrices' gradients were 0.0100. With float32 sums they are 0.0069 and 0.0061."""
    experts = np.full((4000, K), 4, np.int32)
    expected = results(reference.mixture, experts, dtype=jnp.float32)
    found = results(xla.mixture, experts, dtype=jnp.bfloat16)
    for key in ("gate_up", "down"):
        wanted = np.asarray(expected[key], np.float64)
        error = np.asarray(found[key], np.float64) - wanted
        assert np.sqrt((error**2).mean() / (wanted**2).mean()) < 0.008, key
        assert found[key].dtype == jnp.bfloat16


@pytest.mark.slow
def test_the_loop_in_16_bits_on_two_devices():
    """Inside shard_map each device has turns of its own, and its part of the gradients."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    experts = jnp.full((200, K), 4, jnp.int32)
    arrays = draw((200, D), 1), draw((E, D, 2 * F), 3), draw((E, F, D), 4)
    weights = draw((200, K), 2)

    def layer(x, gate_up, down, weights, experts):
        return xla.mixture(x, weights, gate_up, down, make_plan(experts, E))

    def local(x, gate_up, down, *rest):
        own = [jax.lax.pcast(a, "data", to="varying") for a in (gate_up, down)]
        return layer(x, *own, *rest)

    rows = jax.P("data")
    specs = (rows, jax.P(), jax.P(), rows, rows)
    spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows)
    gradients = {}
    for name, function in {"one": layer, "two": spread}.items():
        loss = partial(lambda function, *a: function(*a, weights, experts).sum(), function)
        given = [a.astype(jnp.bfloat16) for a in arrays]
        gradients[name] = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*given)
    for one, two in zip(gradients["one"], gradients["two"], strict=True):
        wanted = np.asarray(one, np.float32)
        # Two sums of half the rows are rounded to 8 bits and added.
        np.testing.assert_allclose(
            np.asarray(two, np.float32), wanted, atol=2**-7 * np.abs(wanted).max()
        )


def test_bitwise_the_same_from_run_to_run():
    experts = ROUTES["half of all rows on one expert"]
    first, second = results(xla.mixture, experts), results(xla.mixture, experts)
    for key in NAMES:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def test_saves_x_the_pre_activation_and_the_routing_only():
    tokens = 64
    plan = make_plan(jnp.asarray(random_experts(tokens)), E)
    arrays = draw((tokens, D), 1), draw((tokens, K), 2), draw((E, D, 2 * F), 3), draw((E, F, D), 4)

    def residuals(x, weights, gate_up, down, plan):
        return jax.vjp(lambda *a: xla.mixture(*a, plan), x, weights, gate_up, down)[1]

    compiled = jax.jit(residuals).lower(*arrays, plan).compile()
    parameters = arrays[2].nbytes + arrays[3].nbytes
    saved = compiled.memory_analysis().output_size_in_bytes - parameters
    rows = E * xla.batch_share(plan.most, E, tokens)
    routing = arrays[1].nbytes + sum(leaf.nbytes for leaf in jax.tree.leaves(plan))
    assert rows < 1.6 * tokens * K
    # the table of pointers to the outputs: 8 bytes each
    table = 8 * (5 + len(jax.tree.leaves(plan)))
    expected = 4 * (tokens * D + rows * 2 * F) + routing
    assert expected <= saved <= expected + table


def test_a_nan_token_spoils_no_other_output():
    experts = random_experts(64)
    x = draw((64, D), 1).at[5].set(jnp.nan)
    plan = make_plan(jnp.asarray(experts), E)
    out = xla.mixture(x, draw((64, K), 2), draw((E, D, 2 * F), 3), draw((E, F, D), 4), plan)
    assert np.isnan(out[5]).all()
    assert np.isfinite(np.delete(np.asarray(out), 5, axis=0)).all()


@pytest.mark.parametrize(
    ("assignments", "experts", "tokens"),
    [(1, 1, 1), (12288, 64, 2048), (96, 64, 16), (6, 64, 1), (2048, 8, 1024), (64, 1, 64)],
)
def test_the_share_is_sensible(assignments, experts, tokens):
    share = xla.batch_share(assignments, experts, tokens)
    assert 0 <= share <= tokens
    if assignments >= 4 * experts:
        assert share >= min(tokens, assignments / experts)
    assert xla.batch_share(64, 1, 64) == 64, "no padding for a single expert"
