"""What a launch costs, told to XLA's scheduler, which cannot look into a kernel.

The scheduler puts transfers beside kernels that take as long. For a call without this estimate it
assumes nearly nothing.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import mlir

from moe_kernels.launch.support import DEFAULT_CAPABILITY, capability

FLOPS = {80: 250e12, 89: 200e12, 90: 600e12, 100: 1500e12}
"""Rates of bfloat16 products by compute capability. Assumed and rounded: the scheduler only needs
to know which transfers a kernel covers."""
BYTES = {80: 1.9e12, 89: 0.9e12, 90: 3.35e12, 100: 8.0e12}
"""Rates of the memory, in bytes a second."""


class Cost(NamedTuple):
    """The work of a launch."""

    flops: int
    """Of the products, for the rows that a balanced router gives."""
    bytes: int
    """Read and written, each number once."""

    def attributes(self) -> dict[str, str]:
        """Frontend attributes of the call. XLA reads latency_metadata, in nanoseconds."""
        target = capability()
        known = target if target in FLOPS else DEFAULT_CAPABILITY
        seconds = max(self.flops / FLOPS[known], self.bytes / BYTES[known])
        return {
            "latency_metadata": str(max(1, round(1e9 * seconds))),
            "flops": str(self.flops),
            "bytes": str(self.bytes),
        }


def priced(results: Sequence[Array], cost: Cost) -> list[Array]:
    """All results of a custom call, unchanged. The call gets the cost as attributes."""
    _register()
    return priced_p.bind(*results, attributes=tuple(cost.attributes().items()))


# jax.experimental.xla_metadata marks a call and also each of its results. The scheduler would count
# the cost for every result once more.
priced_p = Primitive("priced")
priced_p.multiple_results = True
priced_p.def_impl(lambda *results, attributes: list(results))
priced_p.def_abstract_eval(lambda *results, attributes: list(results))


def _lower(ctx: Any, *results: Any, attributes: tuple[tuple[str, str], ...]) -> list[Any]:
    """Marks the call that made the results. Several results become those of a tuple."""
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.lib.mlir.dialects import hlo

    call = results[0].owner
    names: dict[str, Any] = {name: ir.StringAttr.get(value) for name, value in attributes}
    mark: dict[str, Any] = {"mhlo.frontend_attributes": ir.DictAttr.get(names)}
    if len(results) == 1:
        for name, value in mark.items():
            call.attributes[name] = value
        return list(results)
    kept = {name: call.attributes[name] for name in call.attributes}
    packed = ir.Operation.create(
        call.name,
        results=[ir.TupleType.get_tuple([result.type for result in results])],
        operands=list(call.operands),
        attributes=kept | mark,
        ip=ir.InsertionPoint(call),
    )
    unpacked = [hlo.get_tuple_element(packed.result, i) for i in range(len(results))]
    call.erase()
    return unpacked


@cache
def _register() -> None:
    # A cached rule would get its operands as arguments of a function, and not see the call.
    known = inspect.signature(mlir.register_lowering).parameters
    how = {"cacheable": False} if "cacheable" in known else {}
    mlir.register_lowering(priced_p, _lower, platform="cuda", **how)
