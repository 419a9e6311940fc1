"""schedule: the arrays that every kernel of the experts reads its rows from."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jaxtyping import Int

from moe_kernels.launch import launch, power_of_two, require
from moe_kernels.schedule import reference
from moe_kernels.schedule.shapes import SIZES


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """R rows in blocks of one expert each; S = T·K assignments, numbered t·K + k."""

    load: Int[Array, "E"]
    """Assignments of each expert."""
    counts: Int[Array, "E"]
    """Its rows: its load, cut at the capacity where there is one."""
    starts: Int[Array, "E"]
    """Its first row, a multiple of block_rows."""
    assignment: Int[Array, "R"]
    """The assignment of a row, S where it is padding."""
    row: Int[Array, "T K"]
    """The inverse; R where the assignment has no row."""
    experts: Int[Array, "T K"]
    """The expert of each assignment, E where it has no row."""
    block_expert: Int[Array, "blocks"]
    """The expert of each block; the last one's where the block has no rows."""
    block_rows: int = dataclasses.field(metadata={"static": True})
    """Rows of a block."""


def block_count(assignments: int, experts: int, block_rows: int) -> int:
    """Blocks that suffice for any routing: floor(S / block_rows) + min(E, S)."""
    return assignments // block_rows + min(experts, assignments)


def schedule(
    experts: Int[Array, "T K"],
    num_experts: int,
    block_rows: int,
    blocks: int | None = None,
    capacity: int | None = None,
) -> Schedule:
    """Sorts the assignments by expert, earlier ones first, each expert's rows in whole blocks.

    An assignment to `num_experts` is to nobody and has no row. With a `capacity` an expert keeps
    its first so many assignments and the others have no row. `blocks` is block_count of the most
    rows that there can be, S if not given.

    Static shapes, no atomics, nothing read by the host. Raises UnavailableError where kernels
    cannot run, ValueError for block_rows that are no power of two.
    """
    require()
    if block_rows < 1 or block_rows & (block_rows - 1):
        raise ValueError(f"blocks of {block_rows} rows: the kernels take powers of two")
    if blocks is None:
        blocks = block_count(experts.size, num_experts, block_rows)
    experts = experts.astype(jnp.int32)
    if not experts.size:
        empty = reference.schedule(experts, num_experts, block_rows, blocks, capacity)
        load, counts, starts, assignment, row, owner = empty
        return Schedule(load, counts, starts, assignment, row, experts, owner, block_rows)
    before, load = _count(experts, num_experts)
    counts, starts = _layout(load, block_rows, experts.size if capacity is None else capacity)
    assignment, row, owner = _place(experts, before, counts, starts, block_rows, blocks)
    kept = experts
    if capacity is not None:
        kept = jnp.where(row < blocks * block_rows, experts, num_experts)
    return Schedule(load, counts, starts, assignment, row, kept, owner, block_rows)


def _count(experts: Array, num_experts: int) -> tuple[Array, Array]:
    """(each expert's assignments before each chunk [chunks, E], and altogether [E])"""
    from moe_kernels.schedule.kernel import histogram_kernel, scan_kernel

    chunks = -(-experts.size // SIZES.chunk)
    table = ShapeDtypeStruct((chunks, num_experts), jnp.int32)
    (histogram,) = launch(
        histogram_kernel,
        (experts,),
        (table,),
        (chunks,),
        SIZES.tuning,
        S=experts.size,
        E=num_experts,
        C=SIZES.chunk,
        STEP=SIZES.step,
        BE=power_of_two(num_experts),
    )
    before, load = launch(
        scan_kernel,
        (histogram,),
        (table, ShapeDtypeStruct((num_experts,), jnp.int32)),
        (-(-num_experts // SIZES.scan_experts),),
        SIZES.tuning,
        E=num_experts,
        CHUNKS=chunks,
        BC=SIZES.scan_chunks,
        BE=SIZES.scan_experts,
    )
    return before, load


def _layout(load: Array, block_rows: int, capacity: int) -> list[Array]:
    """[counts, starts]"""
    from moe_kernels.schedule.kernel import layout_kernel

    each = ShapeDtypeStruct(load.shape, jnp.int32)
    return launch(
        layout_kernel,
        (load,),
        (each, each),
        (1,),
        SIZES.tuning,
        E=load.size,
        CAPACITY=capacity,
        BM=block_rows,
        BE=power_of_two(load.size),
    )


def _place(
    experts: Array, before: Array, counts: Array, starts: Array, block_rows: int, blocks: int
) -> list[Array]:
    """[assignment, row, block_expert]"""
    from moe_kernels.schedule.kernel import place_kernel

    chunks, num_experts = before.shape
    rows = blocks * block_rows
    return launch(
        place_kernel,
        (experts, before, counts, starts),
        (
            ShapeDtypeStruct((rows,), jnp.int32),
            ShapeDtypeStruct(experts.shape, jnp.int32),
            ShapeDtypeStruct((blocks,), jnp.int32),
        ),
        (chunks + blocks,),
        SIZES.tuning,
        S=experts.size,
        E=num_experts,
        R=rows,
        CHUNKS=chunks,
        C=SIZES.chunk,
        BM=block_rows,
        BE=power_of_two(num_experts),
    )


def schedule_shape(tokens: int, per_token: int, experts: int, block_rows: int) -> Schedule:
    """Shapes alone, for tracing, of a routing without drops."""
    blocks = block_count(tokens * per_token, experts, block_rows)

    def integers(*shape: int) -> Any:
        return ShapeDtypeStruct(shape, "int32")

    return Schedule(
        integers(experts),
        integers(experts),
        integers(experts),
        integers(blocks * block_rows),
        integers(tokens, per_token),
        integers(tokens, per_token),
        integers(blocks),
        block_rows,
    )
