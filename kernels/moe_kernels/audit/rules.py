"""The rules that a compiled kernel must keep."""

from collections.abc import Iterator
from typing import Any

from moe_kernels.audit.compile import shared_limit
from moe_kernels.audit.describe import ROUTING_KERNELS

NO_PRODUCT = ("combine", "decode", "quantise_rows", "quantise_matrices", *ROUTING_KERNELS)
"""Kernels that move, compare and sum. Matrix units and asynchronous copies are not expected."""
MOST_REGISTERS = 255
"""Registers of a thread. A kernel that takes them all would spill with any other compiler."""
FP8_ROWS = 64
"""Rows from which an FP8 tile is multiplied as FP8 on sm_90 and sm_100. Triton converts smaller
ones to fp16. They wait for memory, so that is no loss."""


def broken_rules(row: dict[str, Any]) -> Iterator[str]:
    """The rules that a row of the table breaks, one line each."""
    yield from _exhausted_resources(row)
    if row["kernel"] not in NO_PRODUCT:
        yield from _missing_instructions(row)
    if row["kernel"].endswith("_async"):
        yield from _missing_asynchrony(row)


def _exhausted_resources(row: dict[str, Any]) -> Iterator[str]:
    limit = shared_limit(row["arch"])
    # Local accesses as well: arrays that are indexed by variables land there without a spill.
    if row["spill_bytes"] or row["local_accesses"]:
        yield f"{row['spill_bytes']} bytes spilled, {row['local_accesses']} local accesses"
    # Persistent programs are not in the table: they are a variant for measurements.
    if row["registers"] >= MOST_REGISTERS and "persistent" not in row["config"]:
        yield f"{row['registers']} registers, one step before a spill"
    if row["shared_bytes"] > limit:
        yield f"{row['shared_bytes']} bytes of shared memory, above {limit}"


def _missing_instructions(row: dict[str, Any]) -> Iterator[str]:
    if not row["cp_async"] and not row["tma"]:
        yield "no asynchronous copy"
    # float32 products are exact, and matrix units have no exact float32.
    if not row["mma"] and not row["config"].startswith("fp32"):
        yield "no product on the matrix units"
    if row["config"].startswith("fp8"):
        rows = int(row["config"].split()[1].partition("x")[0])
        if rows >= FP8_ROWS and row["fp8_mma"] < row["mma"]:
            yield f"{row['mma'] - row['fp8_mma']} of {row['mma']} products not on FP8"


def _missing_asynchrony(row: dict[str, Any]) -> Iterator[str]:
    if row["serialised"]:
        yield "products of a warpgroup that wait for each other"
    for key in ("tma", "mbarrier", "setmaxnreg"):
        if not row[key]:
            yield f"no {key}, which the asynchronous kernels are for"
