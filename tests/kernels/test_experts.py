"""The kernels of the experts in Triton's interpreter, against the float32 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_kernels.audit import VARIANTS
from moe_kernels.experts import Source, combine, grouped, launches, mixture
from moe_kernels.experts.reference import mixture as reference
from moe_kernels.experts.shapes import tiles, using

from moe_jax.moe.plan import make_plan

pytest.importorskip("triton")

TOLERANCE = {jnp.float32: (1e-5, 1e-6), jnp.bfloat16: (2e-2, 4e-3), jnp.float16: (2e-2, 4e-3)}
"""(largest, root mean square) of error / max(rms(reference), |reference|)."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def make_inputs(sizes, experts, dtype, seed=0):
    t, d, f, e = sizes
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    x = draw(t, d).astype(dtype)
    d_out = draw(t, d).astype(dtype)
    gate_up = draw(e, d, 2 * f) / d**0.5
    down = draw(e, f, d) / f**0.5
    weights = jnp.asarray(random.random(experts.shape), jnp.float32)
    return (x, weights, gate_up.astype(dtype), down.astype(dtype)), d_out


def assert_close(name, actual, expected, dtype):
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    error = np.abs(actual - expected) / np.maximum(np.sqrt((expected**2).mean()), np.abs(expected))
    most, rms = TOLERANCE[dtype]
    assert error.max() <= most, name  # NaN, the poison of outputs, fails as well
    assert np.sqrt((error**2).mean()) <= rms, name


def check(sizes, experts, dtype=jnp.float32, capacity=None):
    """Output and every gradient, by name, of the kernels and of the reference."""
    experts = jnp.asarray(experts, jnp.int32)
    inputs, d_out = make_inputs(sizes, experts, dtype)
    plan = make_plan(experts, sizes[3], capacity)
    kept = jnp.where(plan.row < plan.assignment.size, experts, sizes[3])
    run = jax.jit(lambda *a: jax.vjp(lambda *b: mixture(*b, plan), *a[:-1])[1](a[-1]))
    wide = [a.astype(jnp.float32) for a in inputs]
    expected, pull = jax.vjp(lambda *a: reference(*a, kept), *wide)
    gradients = run(*inputs, d_out)
    assert_close("out", mixture(*inputs, plan), expected, dtype)
    for name, actual, right in zip(
        ("x", "weights", "gate_up", "down"),
        gradients,
        pull(d_out.astype(jnp.float32)),
        strict=True,
    ):
        if np.any(np.asarray(right)):
            assert_close(name, actual, right, dtype)
        else:
            assert not np.any(np.asarray(actual)), name
    again = run(*inputs, d_out)
    for first, second in zip(gradients, again, strict=True):
        assert np.asarray(first).tobytes() == np.asarray(second).tobytes(), "bitwise repeatable"


def some_experts(tokens, per_token, experts, seed=0):
    random = np.random.default_rng(seed)
    return np.stack([random.permutation(experts)[:per_token] for _ in range(tokens)])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_against_the_reference_by_dtype(dtype):
    check((37, 40, 24, 5), some_experts(37, 2, 5), dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((16, 32, 32, 4), id="whole tiles"),
        pytest.param((33, 57, 23, 6), id="no powers of two"),
        pytest.param((150, 130, 70, 3), id="several tiles", marks=pytest.mark.slow),
        pytest.param((300, 16, 136, 2), id="128 rows a block", marks=pytest.mark.slow),
    ],
)
def test_against_the_reference_by_size(sizes):
    check(sizes, some_experts(sizes[0], 2, sizes[3]))


EDGES = {
    "an expert without a token": ((9, 8, 8, 4), np.full((9, 2), (0, 3))),
    "all tokens to one": ((40, 8, 8, 4), np.full((40, 1), 2)),
    "K = E": ((9, 8, 8, 3), some_experts(9, 3, 3)),
    "E = 1": ((9, 8, 8, 1), np.zeros((9, 1), int)),
    "T = 1": ((1, 8, 8, 4), some_experts(1, 2, 4)),
    "assignments without an expert": ((9, 8, 8, 4), np.full((9, 2), (1, 4))),
}


@pytest.mark.parametrize("name", EDGES)
def test_edge_cases(name):
    check(*EDGES[name])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decoding_computes_each_assignment_by_itself(dtype):
    experts = jnp.asarray([[3, 8], [3, 0], [6, 1]], jnp.int32)  # 8: without an expert
    inputs, _ = make_inputs((3, 70, 37, 8), experts, dtype)
    plan = make_plan(experts, 8)
    decode = jax.make_jaxpr(lambda *a: mixture(*a, plan))(*inputs)
    assert "sort" not in str(decode)
    wide = [a.astype(jnp.float32) for a in inputs]
    assert_close("out", mixture(*inputs, plan), reference(*wide, experts), dtype)


@pytest.mark.parametrize("gathered", [False, True])
def test_one_grouped_product(gathered):
    experts = jnp.asarray(some_experts(40, 2, 3))
    (x, _, gate_up, _), _ = make_inputs((40, 30, 22, 3), experts, jnp.float32)
    plan = make_plan(experts, 3)
    real = np.asarray(plan.assignment) < experts.size
    token = np.where(real, np.asarray(plan.assignment) // 2, 0)
    rows = x if gathered else jnp.asarray(np.asarray(x)[token])
    actual = np.asarray(grouped(rows, gate_up, plan, gathered))[real]
    owner = np.repeat(np.asarray(plan.block_expert), plan.block_rows)
    expected = np.einsum("rd,rdf->rf", np.asarray(x)[token], np.asarray(gate_up)[owner])[real]
    assert_close("rows", actual, expected, jnp.float32)


def test_persistent_programs_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(launches, "multiprocessors", lambda: 3)
    experts = jnp.asarray(some_experts(40, 2, 3))
    inputs, d_out = make_inputs((40, 34, 20, 3), experts, jnp.float32)
    plan = make_plan(experts, 3)

    def run(**change):
        entries = {
            name: tiles(name, jnp.float32, plan.block_rows)._replace(bn=16, **change)
            for name in ("up", "rows", "hidden gradient")
        }
        with using(entries):
            return jax.vjp(lambda *a: mixture(*a, plan), *inputs)[1](d_out)

    chosen = {"resident": 2, "keep_rows": "evict_first", "keep_matrix": "evict_last", "group": 1}
    for one, other in zip(run(), run(**chosen), strict=True):
        np.testing.assert_array_equal(one, other)


def test_capacity_leaves_dropped_assignments_out():
    check((30, 8, 8, 3), some_experts(30, 2, 3), capacity=11)


def test_no_token_at_all():
    inputs, _ = make_inputs((0, 8, 8, 4), np.zeros((0, 2)), jnp.float32)
    assert mixture(*inputs, None).shape == (0, 8)
    x, _, gate_up, _ = inputs
    plan = make_plan(jnp.zeros((0, 2), jnp.int32), 4)
    assert grouped(x, gate_up, plan, gathered=True).shape == (plan.assignment.size, 16)


def test_vmap_goes_through_the_elements_one_by_one():
    experts = jnp.asarray(some_experts(9, 2, 4))
    inputs, _ = make_inputs((9, 8, 8, 4), experts, jnp.float32)
    plan = make_plan(experts, 4)
    both = jax.vmap(lambda x: mixture(x, *inputs[1:], plan))(jnp.stack([inputs[0], -inputs[0]]))
    np.testing.assert_array_equal(both[0], mixture(*inputs, plan))
    np.testing.assert_array_equal(both[1], mixture(-inputs[0], *inputs[1:], plan))


def test_mixed_dtypes_are_refused():
    inputs, _ = make_inputs((9, 8, 8, 4), np.zeros((9, 2)), jnp.float32)
    with pytest.raises(ValueError, match="x bfloat16, gate_up float32"):
        mixture(inputs[0].astype(jnp.bfloat16), *inputs[1:], None)


def test_without_a_way_to_run_it_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    inputs, _ = make_inputs((9, 8, 8, 4), np.zeros((9, 2)), jnp.float32)
    with pytest.raises(RuntimeError, match=r"the devices are cpu.*use implementation 'auto'"):
        mixture(*inputs, None)


@pytest.mark.parametrize("name", [pytest.param("stream", marks=pytest.mark.slow), "wide"])
def test_instructions_of_combine_change_no_bit(name):
    experts = jnp.asarray(some_experts(5, 2, 3), jnp.int32)
    plan = make_plan(experts, 3)
    random = np.random.default_rng(0)
    rows = jnp.asarray(random.normal(size=(plan.assignment.size, 1030)), jnp.bfloat16)
    plain = combine(rows, plan.row)
    jax.clear_caches()  # the entry is no argument of what is traced
    entry = tiles("combine", rows.dtype, 16)._replace(**VARIANTS[name].change)
    with using({"combine": entry}):
        changed = combine(rows, plan.row)
    assert np.asarray(plain).tobytes() == np.asarray(changed).tobytes()


def test_matrices_are_read_in_a_source_and_get_their_own_gradients():
    """Experts 3 to 5 of 8. What lies in the place of the matrices is not read."""
    experts = jnp.asarray([[0, 2], [2, 1], [2, 3], [3, 3]], jnp.int32)  # 3 stands for no expert
    (x, weights, gate_up, down), d_out = make_inputs((4, 16, 16, 8), experts, jnp.float32)
    own = (gate_up[3:6], down[3:6])
    plan = make_plan(experts, 3)
    source = Source(gate_up, down, jnp.int32(3))
    nothing = [jnp.full_like(a, jnp.nan) for a in own]
    out, pull = jax.vjp(lambda *a: mixture(*a, plan, source), x, weights, *nothing)
    expected, pull_expected = jax.vjp(lambda *a: mixture(*a, plan), x, weights, *own)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(mixture(x, weights, *nothing, plan, source), expected)
    for one, two in zip(pull(d_out), pull_expected(d_out), strict=True):
        np.testing.assert_array_equal(one, two)
