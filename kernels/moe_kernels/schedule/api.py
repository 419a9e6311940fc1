"""schedule: the arrays from which every kernel of the experts reads its rows."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jaxtyping import Int

from moe_kernels.launch import launch, next_power_of_two, require_triton
from moe_kernels.schedule import reference
from moe_kernels.schedule.shapes import SIZES


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Schedule:
    """R rows in blocks of one expert each, for S = T·K assignments numbered t·K + k."""

    load: Int[Array, "E"]
    """Assignments of each expert."""
    counts: Int[Array, "E"]
    """Rows of each expert: its load, or the capacity where that is less."""
    starts: Int[Array, "E"]
    """First row of each expert, a multiple of block_rows."""
    assignment: Int[Array, "R"]
    """The assignment of a row, S where it is padding."""
    row: Int[Array, "T K"]
    """The row of an assignment, R where it has none."""
    experts: Int[Array, "T K"]
    """The expert of each assignment, E where it has no row."""
    block_expert: Int[Array, "blocks"]
    """The expert of each block. A block without rows has the last expert."""
    block_rows: int = dataclasses.field(metadata={"static": True})
    """Rows of a block."""


def block_count(assignments: int, experts: int, block_rows: int) -> int:
    """Blocks that suffice for any routing: floor(S / block_rows) + min(E, S).

    Every expert with a row may leave one block partly empty. The bound is static, so that shapes do
    not depend on the routing.
    """
    return assignments // block_rows + min(experts, assignments)


def choose_block_rows(assignments: int, experts: int) -> int:
    """Rows of a block: the mean load as a power of two, between 16 and 128.

    16 is the least that matrix units take. Larger blocks read a matrix less often, and smaller ones
    have less padding.
    """
    mean_load = -(-assignments // experts)
    return min(128, max(16, next_power_of_two(mean_load)))


def schedule(
    experts: Int[Array, "T K"],
    num_experts: int,
    block_rows: int,
    blocks: int | None = None,
    capacity: int | None = None,
) -> Schedule:
    """Sorts the assignments by expert, earlier ones first, each expert's rows in whole blocks.

    An assignment to expert `num_experts` has no expert and no row. With a `capacity` an expert
    keeps that many of its assignments, the first ones, and the others have no row. `blocks` is
    block_count of the most rows that there can be, by default of S.

    Shapes are static, there are no atomics, and the host reads nothing. Raises UnavailableError
    where kernels cannot run, and ValueError for block_rows that are no power of two.
    """
    require_triton()
    if block_rows < 1 or block_rows & (block_rows - 1):
        raise ValueError(f"blocks of {block_rows} rows: the kernels take powers of two")
    if blocks is None:
        blocks = block_count(experts.size, num_experts, block_rows)
    experts = experts.astype(jnp.int32)
    kept = experts
    if not experts.size:  # a grid of no programs cannot be launched
        empty = reference.schedule(experts, num_experts, block_rows, blocks, capacity)
        load, counts, starts, assignment, row, block_expert = empty
    else:
        before, load = _count(experts, num_experts)
        limit = experts.size if capacity is None else capacity
        counts, starts = _layout(load, block_rows, limit)
        assignment, row, block_expert = _place(experts, before, counts, starts, block_rows, blocks)
        if capacity is not None:
            kept = jnp.where(row < blocks * block_rows, experts, num_experts)
    return Schedule(
        load=load,
        counts=counts,
        starts=starts,
        assignment=assignment,
        row=row,
        experts=kept,
        block_expert=block_expert,
        block_rows=block_rows,
    )


def _count(experts: Array, num_experts: int) -> tuple[Array, Array]:
    """(each expert's assignments before each chunk [chunks, E], and altogether [E])."""
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
        BE=next_power_of_two(num_experts),
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
    """[counts, starts]."""
    from moe_kernels.schedule.kernel import layout_kernel

    per_expert = ShapeDtypeStruct(load.shape, jnp.int32)
    return launch(
        layout_kernel,
        (load,),
        (per_expert, per_expert),
        (1,),
        SIZES.tuning,
        E=load.size,
        CAPACITY=capacity,
        BM=block_rows,
        BE=next_power_of_two(load.size),
    )


def _place(
    experts: Array, before: Array, counts: Array, starts: Array, block_rows: int, blocks: int
) -> list[Array]:
    """[assignment, row, block_expert]."""
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
        BE=next_power_of_two(num_experts),
    )


def schedule_shape(tokens: int, per_token: int, experts: int, block_rows: int) -> Schedule:
    """The shapes of a schedule in which no assignment is dropped, for tracing."""
    blocks = block_count(tokens * per_token, experts, block_rows)
    per_expert = ShapeDtypeStruct((experts,), "int32")
    per_assignment = ShapeDtypeStruct((tokens, per_token), "int32")
    shapes = {
        "load": per_expert,
        "counts": per_expert,
        "starts": per_expert,
        "assignment": ShapeDtypeStruct((blocks * block_rows,), "int32"),
        "row": per_assignment,
        "experts": per_assignment,
        "block_expert": ShapeDtypeStruct((blocks,), "int32"),
    }
    return Schedule(**shapes, block_rows=block_rows)  # pyright: ignore[reportArgumentType]
