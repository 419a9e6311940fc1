"""The asynchronous products on a GPU, against float64 in NumPy: pytest -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_kernels import experts_async
from moe_kernels.experts.shapes import using
from moe_kernels.experts_async.shapes import COOPERATIVE
from moe_kernels.launch import async_support
from moe_kernels.quantise.reference import calc_diff
from moe_kernels.soak.case import Case, make_inputs
from moe_kernels.soak.oracle import experts_oracle

from moe_jax.moe.plan import make_plan

pytestmark = pytest.mark.gpu

# T, D, F, E, K. Depths and widths end inside a step and inside a tile.
SIZES = {
    "64 rows": (500, 584, 872, 20, 2),
    "128 rows": (2048, 512, 256, 16, 4),
    "one expert": (3000, 2048, 1032, 1, 1),
    "real": (4096, 2048, 1024, 64, 8),
}
LIMIT = 5e-5
"""Of calc_diff. Rounding to bfloat16 twice gives about 5e-6."""


@pytest.fixture(autouse=True)
def supported():
    support = async_support()
    if support.name != "gpu":
        pytest.skip(support.reason)
    jax.clear_caches()  # the table is no argument of what is traced


@pytest.mark.parametrize("table", [{}, COOPERATIVE])
@pytest.mark.parametrize("skew", ["uniform", "zipf"])
@pytest.mark.parametrize("name", SIZES)
def test_against_the_oracle_and_twice_the_same_bits(name, skew, table):
    if table and name == "64 rows":
        pytest.skip("COOPERATIVE is for 128 rows")
    case = Case(*SIZES[name], dtype="bfloat16", skew=skew, unassigned=False, seed=1)
    inputs = make_inputs(case)
    plan = make_plan(jnp.asarray(inputs.experts), len(inputs.down))
    with using(table):
        run = jax.jit(lambda *arrays: experts_async.mixture(*arrays, plan))
        first = run(*inputs[:4])
        second = run(*inputs[:4])
    assert np.asarray(first).tobytes() == np.asarray(second).tobytes()
    assert calc_diff(first, experts_oracle(inputs)["out"]) < LIMIT
