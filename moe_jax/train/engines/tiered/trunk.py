"""The state of a tiered run without its routed experts, and the two put together."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jaxtyping import Int

from moe_jax.base.initial import named_key
from moe_jax.config import TrainConfig
from moe_jax.model.abstract import split_model
from moe_jax.model.block import Block
from moe_jax.model.transformer import Transformer
from moe_jax.model.trunk import EXPERT, Matrices, of_expert, with_experts, without_experts
from moe_jax.train.state import TrainState, model_key, new_state


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
