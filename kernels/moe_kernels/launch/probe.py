"""Whether the way from Triton to the device holds: a small kernel that is compiled and run."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct

from moe_kernels.errors import first_line
from moe_kernels.launch.assembler import candidates, release_of
from moe_kernels.launch.call import Tuning, launch

SIDE = 64
"""Rows and columns of the product, the least that a group of warps multiplies on sm_90."""


@cache
def launch_fault() -> str:
    """Why a small kernel cannot run on this device, in a line. Empty where it runs.

    Only a run tells: jaxlib assembles Triton's PTX with a ptxas of its own choice, which may be too
    old for it. The kernel uses the matrix units, because their instructions need the newest one.
    The answer is kept for the process.
    """
    # A thread of its own: inside a caller's trace the kernel would be traced and not run.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_fault).result()


def _fault() -> str:
    try:
        out = jax.jit(probe_product)(*2 * [jnp.ones((SIDE, SIDE), jnp.float16)])
        right = bool((out == SIDE).all())
    except Exception as error:  # noqa: BLE001 - any failure is the answer, and it is passed on
        return f"a small Triton kernel fails: {first_line(error)} ({assemblers()})"
    return "" if right else "a small Triton kernel gives wrong numbers"


def probe_product(a: Array, b: Array) -> Array:
    """a b in float32, for two matrices of SIDE rows and columns."""
    from moe_kernels.launch.kernel_probe import probe_kernel

    outputs = (ShapeDtypeStruct((SIDE, SIDE), jnp.float32),)
    return launch(probe_kernel, (a, b), outputs, (1,), Tuning(4, 1), N=SIDE)[0]


def assemblers() -> str:
    """The assemblers that XLA may find, with their releases, as part of a line."""
    found = [(path, release_of(path)) for path in dict.fromkeys(candidates())]
    texts = [f"{path} {'.'.join(map(str, release))}" for path, release in found if release]
    return f"ptxas: {', '.join(texts) or 'none besides the one in jaxlib, if any'}"
