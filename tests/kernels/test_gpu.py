"""The compiled kernels on a GPU, against float64 in NumPy: pytest -m gpu."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from moe_kernels.audit import VARIANTS
from moe_kernels.bench.measure import measure_layers
from moe_kernels.bench.peers import default_peers
from moe_kernels.bench.shapes import Shape
from moe_kernels.experts.shapes import tiles, using
from moe_kernels.launch import fp8_support, triton_support
from moe_kernels.schedule import choose_block_rows
from moe_kernels.soak.case import DTYPES, SKEWS
from moe_kernels.soak.check import attempt, fp8_fault
from moe_kernels.soak.fixed import SIZES, fixed_case
from moe_kernels.soak.search import soak

from moe_jax.moe.implementation import implementation

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_a_gpu():
    support = triton_support()
    assert support.name == "gpu", support.reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZES)
def test_against_the_oracle(name, dtype):
    assert attempt(fixed_case(name, dtype)) is None


@pytest.mark.parametrize("skew", SKEWS)
def test_any_skew_with_assignments_without_an_expert(skew):
    assert attempt(fixed_case("whole blocks", skew=skew, unassigned=True)) is None


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_table(name):
    case = fixed_case("whole blocks")
    operations, change = VARIANTS[name]
    rows = choose_block_rows(case.tokens * case.per_token, case.experts)
    table = {op: tiles(op, jnp.dtype(case.dtype), rows) for op in operations}
    with using({op: entry._replace(**change) for op, entry in table.items()}):
        assert attempt(case) is None


def test_fp8_is_close_to_float32():
    if fp8_support().name != "gpu":
        pytest.skip(fp8_support().reason)
    assert fp8_fault(fixed_case("whole blocks")) is None


def test_auto_takes_the_kernels():
    assert implementation("auto") == "triton"


def test_a_minute_of_random_cases():
    cases, failures = soak(1.0, seed=0, largest=1500)
    assert cases > 0
    assert not failures


def test_the_default_model_trains_with_the_kernels(small_run):
    from moe_jax.runs.run import run_training

    moe = replace(small_run.model.moe, implementation="triton")
    # Three scanned blocks of odd sizes: a layer's slice of the stacked parameters must be aligned
    # to 16 bytes before a kernel gets it.
    run_training(replace(small_run, model=replace(small_run.model, layers=3, moe=moe)))


def test_a_row_of_the_benchmark():
    shape = Shape(4096, 1024, 512, 16, 4)
    row = measure_layers("small", shape, "bfloat16", default_peers(), rounds=2, size=4096)
    assert 0 < row["calls"]["grouped gemm"]["of_gemm"] < 1.2
    assert jax.devices()[0].platform == "gpu"
