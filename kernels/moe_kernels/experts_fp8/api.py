"""mixture on FP8 operands: quantise, two grouped products, combine; gradients in 16 bits."""

from functools import partial

import jax
from jax import Array
from jaxtyping import Float

from moe_kernels.experts import api as experts
from moe_kernels.experts.api import Saved
from moe_kernels.experts.plan import Plan
from moe_kernels.experts_fp8.launches import grouped_product, up_projection
from moe_kernels.launch import require_fp8
from moe_kernels.quantise import quantise_matrices, quantise_rows


def mixture(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    plan: Plan,
    power_of_two: bool = False,
) -> Float[Array, "T D"]:
    """experts.mixture with both products on E4M3 operands (DeepSeek-V3, arXiv:2412.19437, §3.3).

    x and the activation between the products have a scale for 1x128 numbers, the matrices one for
    128x128. Scales are float32, or powers of two. A token is quantised once, before it is gathered.
    Products of 128 along the contraction are added in float32.

    Gradients are straight-through, by the kernels of experts.mixture in x's dtype. They are taken
    from the unquantised x and matrices, and from the z of the FP8 product. Results are the same
    bits from run to run.

    Raises UnavailableError where FP8 kernels cannot run (compute capability below 8.9), and
    ValueError for dtypes or shapes that do not fit.
    """
    require_fp8()
    experts.check(x, weights, gate_up, down)
    if x.size == 0:  # a grid of no programs cannot be launched
        return x
    return _mixture(x, weights, gate_up, down, plan, power_of_two)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _mixture(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan, power_of_two: bool
) -> Array:
    out, _ = _forward(x, weights, gate_up, down, plan, power_of_two=power_of_two, save=False)
    return out


def _forward(
    x: Array,
    weights: Array,
    gate_up: Array,
    down: Array,
    plan: Plan,
    *,
    power_of_two: bool,
    save: bool,
) -> tuple[Array, Array]:
    """(out, z). z is [1, 1] and not written unless `save`."""
    quantised_x = quantise_rows(x, power_of_two, "triton")
    quantised_gate_up = quantise_matrices(gate_up, 2, power_of_two, "triton")
    hidden, z = up_projection(
        quantised_x, quantised_gate_up, plan, x.dtype, power_of_two=power_of_two, save=save
    )
    # After the first product, so that the FP8 copies of both matrices need not exist together.
    quantised_down = quantise_matrices(down, 1, power_of_two, "triton")
    y = grouped_product(hidden, quantised_down, plan, x.dtype)
    return experts.combine(y, plan.row, weights), z


def _save(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Plan, power_of_two: bool
) -> tuple[Array, Saved]:
    out, z = _forward(x, weights, gate_up, down, plan, power_of_two=power_of_two, save=True)
    return out, Saved(x, weights, gate_up, down, plan, z)


def _backward(
    power_of_two: bool, saved: Saved, d_out: Array
) -> tuple[Array, Array, Array, Array, None]:
    # custom_vjp hands over power_of_two first; the 16-bit gradients do not depend on it.
    return experts.backward(saved, d_out)


_mixture.defvjp(_save, _backward)
