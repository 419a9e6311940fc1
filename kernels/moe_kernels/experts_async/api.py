"""mixture with the asynchronous forward products; gradients by the kernels of experts/."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe_kernels.experts import api as experts
from moe_kernels.experts.api import Saved
from moe_kernels.experts.plan import Plan
from moe_kernels.experts_async.launches import grouped_product, up_projection
from moe_kernels.experts_async.shapes import BLOCK_ROWS
from moe_kernels.launch import require_async

MULTIPLE = 8
"""D and F are multiples of it: TMA takes rows whose starts are 16 bytes apart."""


def mixture(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    plan: Plan,
) -> Float[Array, "T D"]:
    """experts.mixture with both forward products by TMA and specialised warps (kernel.py).

    Blocks of 16 or 32 rows, and decoding, are for experts.mixture, which this calls then: they wait
    for memory, and wgmma has no such tiles. Gradients are by the kernels of experts.mixture.

    No GPU has run these products yet. `auto` does not choose them.

    Raises UnavailableError with the reason where they cannot run, and ValueError for float32 and
    for a width that is no multiple of 8.
    """
    require_async()
    experts.check(x, weights, gate_up, down)
    _, hidden, width = down.shape
    if problem := misfit(x.dtype, width, hidden):
        raise ValueError(problem)
    decoding = plan.experts.size <= len(down)
    if x.size == 0 or plan.block_rows not in BLOCK_ROWS or decoding:
        return experts.mixture(x, weights, gate_up, down, plan)
    return _mixture(x, weights, gate_up, down, plan)


def misfit(dtype: jnp.dtype, width: int, hidden: int) -> str:
    """What TMA or the matrix units do not take, in one line; empty if all fits."""
    if dtype == jnp.float32:
        return "float32: the asynchronous products take bfloat16 and float16"
    if width % MULTIPLE or hidden % MULTIPLE:
        return f"D {width} and F {hidden}: TMA needs multiples of {MULTIPLE}"
    return ""


@jax.custom_vjp
def _mixture(x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan) -> Array:
    return _forward(x, weights, gate_up, down, plan, save=False)[0]


def _forward(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan, *, save: bool
) -> tuple[Array, Array]:
    """(out, z). z is [1, 1] and not written unless `save`."""
    hidden, z = up_projection(x, gate_up, plan, save=save)
    return experts.combine(grouped_product(hidden, down, plan), plan.row, weights), z


def _save(x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan) -> tuple[Array, Saved]:
    out, z = _forward(x, weights, gate_up, down, plan, save=True)
    return out, Saved(x, weights, gate_up, down, plan, z)


_mixture.defvjp(_save, experts.backward)
