"""quantise_rows, quantise_matrices: E4M3 values with a float32 scale for every tile."""

from typing import Literal

import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jaxtyping import Float

from moe_kernels.launch import fp8_support, interpreting, launch, require_fp8
from moe_kernels.quantise import reference
from moe_kernels.quantise.reference import E4M3, TILE, Quantised
from moe_kernels.quantise.shapes import MATRICES_TUNING, ROWS, ROWS_TUNING

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
Implementation = Literal["auto", "reference", "triton"]


def quantise_rows(
    x: Float[Array, "R D"], power_of_two: bool = False, implementation: Implementation = "auto"
) -> Quantised:
    """values[r, d] = e4m3(x[r, d] / scales[r, d / 128]): a scale for 128 neighbours of a row.

    scales [R, ceil(D / 128)] = max(largest finite magnitude of the tile, 1e-4) / 448 in float32,
    rounded up to a power of two if asked. Values round to nearest, ties to even. A number that is
    not finite becomes NaN and changes no other. A tile of zeros stays zeros.
    Source: DeepSeek-V3 (arXiv:2412.19437, §3.3.2).

    `reference` and `triton` give the same bits. `auto` is `triton` where that is compiled, and
    `reference` elsewhere. Raises UnavailableError where `triton` cannot run, and ValueError for
    another dtype or rank.
    """
    _check("x [R, D]", x, 2)
    if not _by_kernel(implementation) or not x.size:  # a grid of no programs cannot be launched
        return reference.quantise_rows(x, power_of_two)
    from moe_kernels.quantise.kernel import quantise_rows_kernel

    rows, width = x.shape
    tiles = -(-width // TILE)
    return Quantised(
        *launch(
            quantise_rows_kernel,
            (x,),
            (ShapeDtypeStruct(x.shape, E4M3), ShapeDtypeStruct((rows, tiles), jnp.float32)),
            (-(-rows // ROWS), tiles),
            ROWS_TUNING,
            R=rows,
            D=width,
            TILES=tiles,
            ROWS=ROWS,
            TILE=TILE,
            POWER_OF_TWO=power_of_two,
            UPCAST=interpreting(),
        )
    )


def quantise_matrices(
    w: Float[Array, "E D N"],
    parts: int = 1,
    power_of_two: bool = False,
    implementation: Implementation = "auto",
) -> Quantised:
    """values[e, n, d] = e4m3(w[e, d, n] / scale of the 128x128 block), the matrices transposed.

    FP8 matrix units read both operands along the contraction (D), so D is the last axis. The N
    columns are `parts` matrices side by side with F = N / parts columns each (2 for a gate and an
    up projection). Blocks start anew at each part: scales [E, parts, ceil(F / 128), ceil(D / 128)].
    Everything else is as in quantise_rows.
    """
    _check("w [E, D, N]", w, 3)
    if w.shape[2] % parts:
        raise ValueError(f"w {w.shape} has {w.shape[2]} columns, which are not {parts} equal parts")
    if not _by_kernel(implementation) or not w.size:
        return reference.quantise_matrices(w, parts, power_of_two)
    from moe_kernels.quantise.kernel import quantise_matrices_kernel

    experts, depth, columns = w.shape
    each = columns // parts
    tiles_d = -(-depth // TILE)
    tiles_f = -(-each // TILE)
    return Quantised(
        *launch(
            quantise_matrices_kernel,
            (w,),
            (
                ShapeDtypeStruct((experts, columns, depth), E4M3),
                ShapeDtypeStruct((experts, parts, tiles_f, tiles_d), jnp.float32),
            ),
            (experts * parts * tiles_d, tiles_f),
            MATRICES_TUNING,
            D=depth,
            F=each,
            PARTS=parts,
            TILES_D=tiles_d,
            TILES_F=tiles_f,
            TILE=TILE,
            POWER_OF_TWO=power_of_two,
            UPCAST=interpreting(),
        )
    )


def _check(name: str, array: Array, rank: int) -> None:
    if array.ndim != rank or array.dtype not in DTYPES:
        raise ValueError(
            f"{name} must have {rank} dimensions and be float32, bfloat16 or float16, "
            f"not {array.dtype}{list(array.shape)}"
        )


def _by_kernel(implementation: Implementation) -> bool:
    """Whether the kernel runs. `auto` never takes the interpreter, which is for tests by name."""
    if implementation == "triton":
        require_fp8()
    return implementation == "triton" or (
        implementation == "auto" and fp8_support().name in ("gpu", "lower")
    )
