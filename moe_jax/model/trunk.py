"""A model's parameters in two parts: the routed experts of the sparse blocks, and the trunk.

The trunk is every parameter but those experts' matrices. The module of multi-token prediction, with
its own experts, belongs to the trunk. Training with experts in tiers and decoding keep them apart.
"""

from typing import Any

from flax import nnx
from jax import Array

from moe_jax.model.parameters import dotted, role_of

SPARSE_BLOCKS = ("sparse", "blocks")
EXPERT = ("down", "gate_up")
"""Names of an expert's matrices. Every tuple of them has this order, which is that of a tree's
leaves: JAX sorts keys."""
Matrices = tuple[Array, ...]
"""down [n, F, D], gate_up [n, D, 2F]."""


def without_experts(parameters: nnx.State) -> nnx.State:
    """The trunk's parameters."""
    flat = nnx.to_flat_state(parameters)
    return nnx.from_flat_state([(path, leaf) for path, leaf in flat if not of_expert(path)])


def with_experts(trunk: nnx.State, matrices: tuple[Any, ...]) -> nnx.State:
    """`trunk` with the stacked experts [layers, E, …] (or anything in their place)."""
    flat = list(nnx.to_flat_state(trunk))
    for name, stacked in zip(EXPERT, matrices, strict=True):
        flat.append(((*SPARSE_BLOCKS, "moe", name), nnx.Param(stacked)))
    return nnx.from_flat_state(flat)


def of_expert(path: tuple[Any, ...]) -> bool:
    """Whether a leaf belongs to the routed experts of the sparse blocks.

    The path is that of a leaf of the parameters or of an optimizer's state.
    """
    name = dotted(path)
    # Counters of an optimizer's state have no name at all.
    return f"{'.'.join(SPARSE_BLOCKS)}." in name and role_of(name) == "expert"


def split_blocks(trunk: nnx.State) -> tuple[nnx.State, nnx.State]:
    """(everything outside the sparse blocks, the blocks)"""
    depth = len(SPARSE_BLOCKS)
    inside = []
    outside = []
    for path, leaf in nnx.to_flat_state(trunk):
        if path[:depth] == SPARSE_BLOCKS:
            inside.append((path[depth:], leaf))
        else:
            outside.append((path, leaf))
    return nnx.from_flat_state(outside), nnx.from_flat_state(inside)


def join_blocks(rest: nnx.State, blocks: nnx.State) -> nnx.State:
    """The inverse of split_blocks."""
    flat = list(nnx.to_flat_state(rest))
    flat += [((*SPARSE_BLOCKS, *path), leaf) for path, leaf in nnx.to_flat_state(blocks)]
    return nnx.from_flat_state(flat)


def sparse_experts(parameters: nnx.State) -> Matrices:
    """The stacked experts of all sparse blocks, [layers, E, …] each, in the order of EXPERT."""
    flat = {path: leaf for path, leaf in nnx.to_flat_state(parameters) if of_expert(path)}
    return tuple(flat[*SPARSE_BLOCKS, "moe", name][...] for name in EXPERT)
