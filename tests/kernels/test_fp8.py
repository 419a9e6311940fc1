"""The experts on FP8 operands in Triton's interpreter, against the reference of the same rounding
and against the unquantised products."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_kernels.experts import reference as exact
from moe_kernels.experts_fp8 import launches, mixture, reference
from moe_kernels.launch import UnavailableError, fp8_support, lowering_for
from moe_kernels.quantise import quantise_matrices, quantise_rows
from moe_kernels.quantise.reference import calc_diff

from moe_jax.moe.plan import make_plan
from tests.kernels.test_experts import make_inputs, some_experts

pytest.importorskip("triton")
# NumPy's sigmoid of a very negative number in the interpreter: 1 / (1 + inf) is the 0 it should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

OUTPUT = (2e-2, 4e-4)
"""(largest, root mean square) of error / max(rms, |reference|) of the output in float32: kernel and
reference sum z in another order, so that now and then one activation rounds to E4M3's neighbour,
an eighth away; the rest is float32."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def assert_close(name, actual, expected, limits):
    actual = np.asarray(actual, np.float64)
    expected = np.asarray(expected, np.float64)
    error = np.abs(actual - expected) / np.maximum(np.sqrt((expected**2).mean()), np.abs(expected))
    assert error.max() <= limits[0], name  # NaN, the poison of outputs, fails as well
    assert np.sqrt((error**2).mean()) <= limits[1], name


def prepare(sizes, experts, dtype, capacity):
    """(inputs, d_out, plan, the experts that are kept)"""
    experts = jnp.asarray(experts, jnp.int32)
    plan = make_plan(experts, sizes[3], capacity)
    kept = jnp.where(plan.row < plan.assignment.size, experts, sizes[3])
    return *make_inputs(sizes, experts, dtype), plan, kept


def check_output(sizes, experts, capacity=None, power_of_two=False):
    """The kernels' output against the reference's, in float32."""
    inputs, _, plan, kept = prepare(sizes, experts, jnp.float32, capacity)
    actual = jax.jit(lambda *a: mixture(*a, plan, power_of_two))(*inputs)
    expected = jax.jit(lambda *a: reference.mixture(*a, kept, power_of_two))(*inputs)
    assert_close("out", actual, expected, OUTPUT)


def check(sizes, experts, dtype=jnp.float32):
    """Output and every gradient, by name, of the kernels and of the reference."""
    inputs, d_out, plan, kept = prepare(sizes, experts, dtype, None)

    @jax.jit
    def run(*arrays):
        out, pull = jax.vjp(lambda *a: mixture(*a, plan), *arrays[:-1])
        return mixture(*arrays[:-1], plan), out, pull(arrays[-1])

    @jax.jit
    def run_reference(*arrays):
        wide = [a.astype(jnp.float32) for a in arrays]
        out, pull = jax.vjp(lambda *a: reference.mixture(*a, kept), *wide[:-1])
        return out, pull(wide[-1])

    alone, out, gradients = run(*inputs, d_out)
    expected, expected_gradients = run_reference(*inputs, d_out)
    # Gradients: float32 sums, of up to 1,000 terms of either sign; 16 bits as in test_experts.
    close = (OUTPUT, (2e-4, 1e-5)) if dtype == jnp.float32 else ((2e-2, 4e-3), (3e-2, 4e-3))
    assert_close("out", out, expected, close[0])
    assert np.asarray(alone).tobytes() == np.asarray(out).tobytes(), "without z, and repeatable"
    names = ("x", "weights", "gate_up", "down")
    for name, actual, right in zip(names, gradients, expected_gradients, strict=True):
        assert_close(name, actual, right, close[1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_against_the_reference_by_dtype(dtype):
    check((20, 40, 24, 3), some_experts(20, 2, 3), dtype)


@pytest.mark.parametrize(
    "sizes",
    [(33, 130, 200, 4), (140, 140, 24, 2)],
    ids=["several tiles, no multiples of 128", "128 rows a block"],
)
def test_against_the_reference_by_size(sizes):
    check_output(sizes, some_experts(sizes[0], 2, sizes[3]))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_whole_tiles_with_either_kind_of_scale(power_of_two):
    check_output((20, 256, 128, 3), some_experts(20, 2, 3), power_of_two=power_of_two)


EDGES = {
    "an expert without a token": ((9, 8, 8, 4), np.full((9, 2), (0, 3))),
    "all tokens to one": ((40, 8, 8, 4), np.full((40, 1), 2)),
    "K = E": ((9, 8, 8, 3), some_experts(9, 3, 3)),
    "T = 1": ((1, 8, 8, 4), some_experts(1, 2, 4)),
    "assignments without an expert": ((9, 8, 8, 4), np.full((9, 2), (1, 4))),
}


@pytest.mark.parametrize("name", EDGES)
def test_edge_cases(name):
    check_output(*EDGES[name])


def test_capacity_leaves_dropped_assignments_out():
    check_output((30, 8, 8, 3), some_experts(30, 2, 3), capacity=11)


def test_a_nan_stays_with_its_token():
    experts = jnp.asarray(some_experts(20, 2, 3))
    inputs, _ = make_inputs((20, 140, 24, 3), experts, jnp.float32)
    x = inputs[0].at[4, 3].set(jnp.nan)
    plan = make_plan(experts, 3)
    out = jax.jit(lambda *a: mixture(*a, plan))(x, *inputs[1:])
    assert np.isnan(out[4]).all()
    assert np.isfinite(np.delete(out, 4, axis=0)).all()


def draw(name, shape, seed):
    """normal; heavy: Student's t with 3 degrees of freedom, rows of unlike size as well."""
    random = np.random.default_rng(seed)
    if name == "normal":
        return random.normal(size=shape)
    return random.standard_t(3, size=shape) * np.exp(random.normal(size=(*shape[:-1], 1)))


def products(x, gate_up, down):
    """[(name, FP8 product, exact product)] of one expert: x gate_up, and x's first F columns as
    activations times down."""
    plan = make_plan(jnp.zeros((len(x), 1), jnp.int32), 1)
    inputs = [jnp.asarray(a, jnp.float32) for a in (x, gate_up, down)]
    hidden = x[:, : down.shape[1]]

    @jax.jit
    def run(x, gate_up, down):
        _, z = launches.up_projection(
            quantise_rows(x),
            quantise_matrices(gate_up, 2),
            plan,
            jnp.float32,
            power_of_two=False,
            save=True,
        )
        rows = jnp.take(x, plan.assignment, axis=0, mode="fill", fill_value=0)
        rows = quantise_rows(rows[:, : down.shape[1]])
        y = launches.grouped_product(rows, quantise_matrices(down), plan, jnp.float32)
        return z[plan.row[:, 0]], y[plan.row[:, 0]]

    z, y = run(*inputs)
    return [("up", z, x @ gate_up[0]), ("down", y, hidden @ down[0])]


@pytest.mark.parametrize("inputs", ["normal", "heavy"])
@pytest.mark.parametrize("matrices", ["normal", "heavy"])
def test_calc_diff_of_each_product_is_below_a_thousandth(inputs, matrices):
    x = draw(inputs, (48, 384), 0)
    gate_up = draw(matrices, (1, 384, 320), 1)
    down = draw(matrices, (1, 160, 256), 2)
    for name, actual, expected in products(x, gate_up, down):
        assert 1e-5 < calc_diff(actual, expected) < 1e-3, name


def test_calc_diff_fails_where_an_outlier_hides_its_tile():
    """100,000 times the rest, on an input that the matrix does not read: the others of its tile
    fall under the smallest number. Without a reader's zeros the outlier is the product."""
    x = draw("normal", (48, 128), 0)
    gate_up = draw("normal", (1, 128, 64), 1)
    x[:, 5] *= 1e5
    down = draw("normal", (1, 32, 8), 2)
    (_, actual, expected), _ = products(x, gate_up, down)
    assert calc_diff(actual, expected) < 1e-3
    gate_up[:, 5] = 0
    (_, actual, expected), _ = products(x, gate_up, down)
    assert calc_diff(actual, expected) > 1e-1


def test_calc_diff_of_the_whole_layer():
    """Four roundings, not two: the layer's own difference is about 0.002."""
    experts = jnp.asarray(some_experts(60, 2, 3))
    inputs, _ = make_inputs((60, 256, 128, 3), experts, jnp.float32)
    plan = make_plan(experts, 3)
    out = jax.jit(lambda *a: mixture(*a, plan))(*inputs)
    expected = jax.jit(lambda *a: exact.mixture(*a, experts))(*inputs)
    assert 1e-3 < calc_diff(out, expected) < 3e-3


def test_calc_diff_is_half_the_squared_relative_error():
    x = np.random.default_rng(0).normal(size=1000)
    assert calc_diff(x, x) == 0
    assert calc_diff(x, -x) == 2
    assert calc_diff(np.zeros(3), np.zeros(3)) == 0
    y = x + 0.01 * np.random.default_rng(1).normal(size=1000)
    assert calc_diff(x, y) == pytest.approx(0.5 * 0.01**2, rel=0.1)


def test_ampere_is_refused_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    inputs, _ = make_inputs((9, 8, 8, 4), np.zeros((9, 2)), jnp.float32)
    with lowering_for(80), pytest.raises(UnavailableError, match=r"8\.0 has no FP8 matrix units"):
        mixture(*inputs, None)
    for capability in (89, 90, 100):
        with lowering_for(capability):
            assert fp8_support().name == "lower"


PROGRAM = """
import json
import jax
import jax.numpy as jnp
from moe_kernels.launch import lowering_for
from moe_jax.config import MoEConfig
from moe_jax.moe.layer import Gate, Layer, moe_layer

config = MoEConfig(experts=4, experts_per_token=2, expert_hidden=64, precision="fp8")
shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
gate = Gate(shape(128, 4), jax.ShapeDtypeStruct((4,), jnp.float32))
parameters = Layer(gate, shape(4, 128, 128), shape(4, 64, 128))

def loss(x, parameters):
    return moe_layer(x, parameters, config)[0].astype(jnp.float32).sum()

counts = {}
for capability in (80, 90, 100):
    with lowering_for(capability):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        traced = step.trace(shape(2, 32, 128), parameters)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    counts[capability] = text.count("triton_kernel_call"), text.count("f8E4M3FN")
print(json.dumps(counts))
"""


@pytest.mark.slow  # the audit compiles these launches as well
def test_a_jitted_gradient_holds_the_kernels_for_each_architecture():
    pytest.importorskip("jax_cuda13_plugin")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts.pop("80")[0] == 0, "without FP8 matrix units `auto` is the emulation"
    # The gate, four of the schedule; three quantisers, two products, combine; the 16-bit backward
    # pass: hidden gradient, two matrix gradients, the transposed product, combine.
    assert all(calls == 16 and fp8 > 0 for calls, fp8 in counts.values()), counts
