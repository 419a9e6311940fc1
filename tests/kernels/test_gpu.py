"""The compiled kernels on a GPU, against float64 in NumPy: pytest -m gpu."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "kernels"))
import bench
import soak
from moe_kernels import experts_fp8
from moe_kernels.audit import VARIANTS
from moe_kernels.experts.shapes import tiles, using
from moe_kernels.launch import fp8_support, triton_support

from moe_jax.moe.implementation import implementation
from moe_jax.moe.plan import block_rows, make_plan

pytestmark = pytest.mark.gpu

SIZES = {
    "odd": (727, 577, 859, 5, 2),
    "one token": (1, 512, 256, 16, 4),
    "K = E": (300, 256, 128, 4, 4),
    "E = 1": (300, 256, 128, 1, 1),
    "whole blocks": (2048, 512, 256, 16, 4),
    "E is no power of two": (1000, 512, 352, 60, 4),
    "many experts": (512, 256, 128, 256, 8),
}


@pytest.fixture(autouse=True)
def on_a_gpu():
    route = triton_support()
    assert route.name == "gpu", route.reason


def make_case(name, dtype="bfloat16", skew="zipf", nobody=False):
    return soak.Case(*SIZES[name], dtype, skew, nobody, seed=1)


@pytest.mark.parametrize("dtype", soak.DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_against_the_oracle(name, dtype):
    assert soak.attempt(make_case(name, dtype)) is None


@pytest.mark.parametrize("skew", soak.SKEWS)
def test_any_skew_with_assignments_to_nobody(skew):
    assert soak.attempt(make_case("whole blocks", skew=skew, nobody=True)) is None


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_table(name):
    case = make_case("whole blocks")
    operations, change = VARIANTS[name]
    rows = block_rows(case.tokens * case.per_token, case.experts)
    table = {op: tiles(op, jnp.dtype(case.dtype), rows) for op in operations}
    with using({op: entry._replace(**change) for op, entry in table.items()}):
        assert soak.attempt(case) is None


def test_fp8_is_close_to_float32():
    if fp8_support().name != "gpu":
        pytest.skip(fp8_support().reason)
    inputs = soak.make_inputs(make_case("whole blocks"))
    plan = make_plan(jnp.asarray(inputs.experts), len(inputs.down), kernels=True)
    found = np.asarray(experts_fp8.mixture(*inputs[:4], plan), np.float64)
    right = soak.oracle(inputs)["out"]
    assert 1 - 2 * np.vdot(found, right) / (np.vdot(found, found) + np.vdot(right, right)) < 5e-3


def test_auto_takes_the_kernels():
    assert implementation("auto") == "triton"


def test_a_minute_of_random_cases():
    cases, failures = soak.soak(1.0, seed=0, largest=1500)
    assert cases > 0
    assert not failures


def test_the_default_model_trains_with_the_kernels(small_run):
    from moe_jax.runs.run import run_training

    moe = replace(small_run.model.moe, implementation="triton")
    run_training(replace(small_run, model=replace(small_run.model, moe=moe)))


def test_a_row_of_the_benchmark():
    row = bench.bench("small", bench.Shape(4096, 1024, 512, 16, 4), "bfloat16", rounds=2, size=4096)
    assert 0 < row["calls"]["grouped gemm"]["of_gemm"] < 1.2
    assert jax.devices()[0].platform == "gpu"
