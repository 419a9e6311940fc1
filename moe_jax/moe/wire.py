"""Rows on their way in E4M3: half of bfloat16's bytes, and a power of two for 128 neighbours."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, UInt8
from moe_kernels.quantise import quantise_rows
from moe_kernels.quantise.reference import E4M3, TILE

from moe_jax.parallel.exchange import Transfer


def send_in_fp8(rows: Float[Array, "N D"], transfer: Transfer) -> Float[Array, "N D"]:
    """transfer.there(rows), with every number rounded to E4M3 times the scale of its tile.

    A number is off by at most 1/16 of itself, or by 2^-10 of its tile's scale where it is small
    (DeepSeek-V3 sends activations so, arXiv:2412.19437, §3.3). The gradient travels back as it is,
    in the dtype of the rows.
    """
    return _send(rows, transfer.there, transfer.back)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _send(rows: Array, there: Callable[[Array], Array], back: Callable[[Array], Array]) -> Array:
    return _unpack(there(_pack(rows)), rows.shape[1], rows.dtype)


_send.defvjp(
    lambda rows, there, back: (_send(rows, there, back), None),
    lambda there, back, _, d_received: (back(d_received),),
)


def _pack(rows: Float[Array, "N D"]) -> UInt8[Array, "N bytes"]:
    """The values' bytes and then those of the scales, so that one transfer takes both."""
    values, scales = quantise_rows(rows, power_of_two=True)
    bytes_of_scales = lax.bitcast_convert_type(scales, jnp.uint8).reshape(len(rows), -1)
    return jnp.concatenate([lax.bitcast_convert_type(values, jnp.uint8), bytes_of_scales], axis=1)


def _unpack(packed: UInt8[Array, "N bytes"], width: int, dtype: jnp.dtype) -> Float[Array, "N D"]:
    values = lax.bitcast_convert_type(packed[:, :width], E4M3).astype(jnp.float32)
    scales = packed[:, width:].reshape(len(packed), -1, 4)
    scales = lax.bitcast_convert_type(scales, jnp.float32)
    return (values * jnp.repeat(scales, TILE, axis=1)[:, :width]).astype(dtype)
