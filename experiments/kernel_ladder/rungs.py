"""The rungs of the ladder: the same layer, one idea after the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from moe_kernels import experts_fp8
from moe_kernels.bench.peers import ragged
from moe_kernels.experts import combine, grouped, mixture
from moe_kernels.experts.shapes import OPERATIONS, Tiles, tiles, using
from moe_kernels.experts_fp8.launches import grouped_product, up_projection
from moe_kernels.launch import FP8_CAPABILITY
from moe_kernels.quantise import Quantised, quantise_matrices, quantise_rows

from moe_jax.moe import xla
from moe_jax.moe.experts import swiglu


def separate(
    x: Array, weights: Array, gate_up: Array, down: Array, plan: Any, gathered: bool = False
) -> Array:
    """The layer by grouped products alone.

    Gather (in the product's prologue if `gathered`), first product, SwiGLU and second product come
    one after the other, then the combine kernel.
    """
    rows = x
    if not gathered:
        rows = jnp.take(x, plan.assignment // weights.shape[1], axis=0, mode="clip")
    hidden = swiglu(grouped(rows, gate_up, plan, gathered))
    return combine(grouped(hidden, down, plan), plan.row, weights)


def separate_gathered(x: Array, weights: Array, gate_up: Array, down: Array, plan: Any) -> Array:
    """separate, with the gather in the prologue."""
    return separate(x, weights, gate_up, down, plan, gathered=True)


def train_of(layer: Callable[..., Array], *arguments: Any) -> tuple[Array, Any]:
    """Output and gradients of a layer, from its inputs, the plan and the output's gradient."""
    *arrays, plan, d_out = arguments
    out, pull = jax.vjp(lambda *inputs: layer(*inputs, plan), *arrays)
    return out, pull(d_out)


train = partial(train_of, mixture)
"""Output and gradients by the kernels, which keep z alone."""


def train_with_y(y: Array, *arguments: Any) -> tuple[Any, Array]:
    """train, and the gate weights' gradients once more from the second product's output y [R, D].

    Layers that keep y compute them so: rowsum(y · d_out[token]).
    """
    *_, plan, d_out = arguments
    token = plan.assignment // plan.row.shape[1]
    rows = jnp.take(d_out, token, axis=0, mode="clip")
    return train(*arguments), jnp.sum(y * rows, axis=1, dtype=jnp.float32)


def quantise_once(gate_up: Array, down: Array) -> tuple[Quantised, Quantised]:
    """The matrices of `fp8_once`."""
    scales = {"power_of_two": False, "implementation": "triton"}
    return quantise_matrices(gate_up, 2, **scales), quantise_matrices(down, 1, **scales)


def fp8_once(x: Array, weights: Array, gate_up: Quantised, down: Quantised, plan: Any) -> Array:
    """experts_fp8.mixture with matrices that were quantised before, as in inference."""
    rows = quantise_rows(x, False, "triton")
    hidden, _ = up_projection(rows, gate_up, plan, x.dtype, power_of_two=False, save=False)
    return combine(grouped_product(hidden, down, plan, x.dtype), plan.row, weights)


class Rung(NamedTuple):
    """What is run, and what its tiles have of the table's entries."""

    name: str
    layer: Callable[..., Array]
    idea: str
    change: dict[str, Any] | None
    """Fields of Tiles that differ from the table's entries. None: no Triton kernel at all."""
    prepare: Callable[[Array, Array], tuple[Any, Any]] | None = None
    """Makes the layer's matrices from gate_up and down, once and not in every step."""


NAIVE = {"stages": 1, "group": 1}
SYNCHRONOUS = NAIVE
PIPELINED = {"group": 1}
RUNGS = (
    Rung("ragged_dot", ragged, "jax.lax.ragged_dot, which XLA expands to a dense product", None),
    Rung("xla", xla.mixture, "XLA's own path: batched products of padded shares", None),
    Rung("grouped", separate, "grouped products in Triton, no asynchronous copy", SYNCHRONOUS),
    Rung("gather", separate_gathered, "rows gathered in the product's prologue", SYNCHRONOUS),
    Rung("async", separate_gathered, "copies in flight while the matrix units work", PIPELINED),
    Rung("epilogue", mixture, "SwiGLU in the first product's epilogue", PIPELINED),
    Rung("persistent", mixture, "one program a multiprocessor, tile after tile",
         {"group": 1, "resident": 1}),
    Rung("raster", mixture, "tiles of one expert that share rows and matrix are neighbours", {}),
    Rung("hints", mixture, "matrices kept in L2, rows let go first",
         {"keep_rows": "evict_first", "keep_matrix": "evict_last"}),
    Rung("ptx", mixture, "SwiGLU by tanh.approx, inline PTX", {"fast_silu": True}),
    Rung("fp8", experts_fp8.mixture, "8 bits, matrices quantised at every step", {}),
    Rung("fp8_once", fp8_once, "8 bits, matrices quantised once", {}, quantise_once),
)  # fmt: skip
"""Each rung holds the ideas of those before it, but for VARIANTS, which stand each on its own."""
VARIANTS = {
    "persistent": "epilogue",
    "hints": "raster",
    "ptx": "raster",
    "fp8": "raster",
    "fp8_once": "raster",
}
"""The rung that a variant is compared with. The others are compared with the rung before."""


def possible(arch: int) -> list[Rung]:
    """Those that a device of this compute capability (times ten) can run."""
    return [rung for rung in RUNGS if not rung.name.startswith("fp8") or arch >= FP8_CAPABILITY]


def rung_of(name: str) -> Rung:
    """The rung of this name."""
    return next(rung for rung in RUNGS if rung.name == name)


def before(rung: Rung) -> str | None:
    """The rung that this one adds its idea to."""
    if rung.name in VARIANTS:
        return VARIANTS[rung.name]
    ladder = [r.name for r in RUNGS if r.name not in VARIANTS]
    at = ladder.index(rung.name)
    return ladder[at - 1] if at else None


@contextmanager
def built(rung: Rung, dtype: Any, block_rows: int) -> Iterator[None]:
    """Programs traced inside are that rung's."""
    with using(entries(rung, dtype, block_rows)):
        yield


def entries(rung: Rung, dtype: Any, block_rows: int) -> dict[str, Tiles]:
    """The table's entries with the rung's change."""
    change = dict(rung.change or {})
    stages = change.pop("stages", None)
    found = {}
    for operation in OPERATIONS:
        entry = tiles(operation, jnp.dtype(dtype), block_rows)._replace(**change)
        if stages:
            entry = entry._replace(tuning=entry.tuning._replace(stages=stages))
        found[operation] = entry
    return found
