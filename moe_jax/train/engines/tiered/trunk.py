"""The state of a tiered run without its routed experts (the trunk), and the two put together.

The trunk is every parameter but the routed experts' matrices of the sparse blocks. The module of
multi-token prediction, with its own experts, belongs to it.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array
from jaxtyping import Int

from moe_jax.base.initial import named_key
from moe_jax.config import TrainConfig
from moe_jax.model.abstract import split_model
from moe_jax.model.block import Block
from moe_jax.model.parameters import dotted, role_of
from moe_jax.model.transformer import Transformer
from moe_jax.train.state import TrainState, model_key, new_state

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


def init_trunk(config: TrainConfig) -> TrainState:
    """init_state without the experts (jit it: their initialisation is then left out)."""
    model = Transformer(config.model, key=model_key(config))
    _, parameters, router = split_model(model)
    return new_state(config, without_experts(parameters), router)


def init_experts(config: TrainConfig, layer: Int[Array, ""]) -> Matrices:
    """The experts of one sparse block, [E, …], as init_state makes them."""
    key = named_key(model_key(config), "sparse", layer)
    block = Block(config.model, sparse=True, key=key)
    return tuple(getattr(block.moe, name)[...] for name in EXPERT)


def assemble(whole: TrainState, trunk: TrainState, rows: Callable[[str], list[Any]]) -> TrainState:
    """The state as the dense engine has it.

    `whole` gives its form (abstract). `trunk` gives everything but the experts, and
    rows("parameters" | "moments") gives their stacked parts, [layers, E, …] each.
    """
    parameters = with_experts(trunk.parameters, tuple(rows("parameters")))
    # Both iterators follow the order of the leaves in the whole optimizer state.
    moments = iter(rows("moments"))
    rest = iter(jax.tree.leaves(trunk.optimizer))
    leaves, form = jax.tree_util.tree_flatten_with_path(whole.optimizer)
    filled = [next(moments) if of_expert(path) else next(rest) for path, _ in leaves]
    return trunk._replace(parameters=parameters, optimizer=jax.tree.unflatten(form, filled))
