"""The dtype in which gradients are summed over devices, read from the partitioned program."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import ParallelConfig
from moe_jax.model.layout import shardings
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import batch_sharding, with_sharding
from moe_jax.train.state import abstract_state
from moe_jax.train.step import make_gradient
from tests.conftest import SMALL_MODEL, make_run

SUM = re.compile(r"= (\w+)\[([\d,]+)\]\S* (?:all-reduce|reduce-scatter)\(")


def matrix_sums(program: str) -> set[str]:
    """The dtypes in which arrays of more than one dimension are summed over devices."""
    return {dtype for dtype, shape in SUM.findall(program) if "," in shape}


def partitioned(config, folder) -> str:
    """The gradient's program over two devices, just after XLA has partitioned it.

    Later passes of the CPU's compiler sum bfloat16 in float32 whatever was asked for.
    """
    mesh = make_mesh(ParallelConfig(fsdp=2))
    state = abstract_state(config)
    with jax.set_mesh(mesh):
        state = with_sharding(state, shardings(mesh, state))
        shape = (config.batch, config.data.length + 1)
        row = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
        batch = {"tokens": row, "segments": row}
        key = jax.random.key(0)
        lowered = jax.jit(make_gradient(config)).lower(state.parameters, state.router, batch, key)
        options = {"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"}
        lowered.compile(compiler_options=options)
    (after,) = folder.glob("*after_spmd-partitioning*")
    return after.read_text()


@pytest.mark.parametrize(
    ("gradient", "sums"),
    [("float32", {"f32"}), pytest.param("compute", {"bf16", "f32"}, marks=pytest.mark.slow)],
)
def test_gradients_are_summed_in_the_dtype_of_the_config(tmp_path, gradient, sums):
    model = replace(SMALL_MODEL, compute_dtype="bfloat16", gradient_dtype=gradient)
    config = make_run(tmp_path / "run", model)
    folder = tmp_path / "hlo"
    folder.mkdir()
    program = partitioned(config, folder)
    # Router, embedding and head are summed in float32 in any case.
    assert matrix_sums(program) == sums
    assert "bf16[6,20,28]{2,1,0} all-gather(" in program, "what is gathered is in compute_dtype"
