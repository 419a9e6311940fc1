"""The audit of a kernel that is interpreted here."""

import jax.numpy as jnp
import pytest
import triton
import triton.language as tl
from moe_kernels.audit import compile_elsewhere
from moe_kernels.launch import Tuning, launch, recording


@triton.jit
def row_sums_kernel(x, y, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    row = tl.program_id(0)
    tl.store(y + row, tl.sum(tl.load(x + row * WIDTH + column), axis=0))


@triton.jit
def wrong_kernel(x, y, WIDTH: tl.constexpr):
    tl.store(y, tl.load(x) + not_there)


def recorded(kernel):
    with recording(90) as launches:
        launch(kernel, [jnp.ones((4, 64))], [jnp.ones(4)], (4,), Tuning(warps=2), WIDTH=64)
    return launches[0]


@pytest.mark.slow
def test_a_kernel_of_a_notebook_is_compiled_in_another_process():
    [ampere, hopper] = compile_elsewhere(recorded(row_sums_kernel), archs=(80, 90))
    assert (ampere["arch"], hopper["arch"]) == (80, 90)
    assert ampere["kernel"] == "row_sums"
    assert 0 < hopper["registers"] < 255
    with pytest.raises(RuntimeError, match=r"(?s)wrong_kernel cannot be compiled.*not_there"):
        compile_elsewhere(recorded(wrong_kernel), archs=(90,))
