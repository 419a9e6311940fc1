"""The model as shapes and dtypes: its static graph and its abstract parameters."""

from functools import lru_cache

import jax
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig
from moe_jax.model.block import Block
from moe_jax.model.transformer import Transformer
from moe_jax.moe.module import ExpertSlots, RouterBias


def abstract_model(config: ModelConfig) -> Transformer:
    """Transformer(config) whose arrays are shapes and dtypes.

    Nothing is allocated: a model of 671B parameters takes a second.
    """
    # The key's value does not matter: eval_shape draws nothing.
    return nnx.eval_shape(lambda: Transformer(config, key=jax.random.key(0)))


def abstract_block(config: ModelConfig) -> Block:
    """One sparse block whose arrays are shapes and dtypes."""
    return nnx.eval_shape(lambda: Block(config, sparse=True, key=jax.random.key(0)))


def abstract_states(config: ModelConfig) -> tuple[nnx.State, nnx.State]:
    """(parameters, router biases) as shapes and dtypes."""
    _, parameters, router = split_model(abstract_model(config))
    return parameters, router


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(static graph, parameters, router biases): nnx.merge puts them together again."""
    graph, parameters, router = nnx.split(model, nnx.Param, RouterBias)
    return graph, parameters, router


# Cached, because abstract_model takes a second for a large model, and every program asks for it.
@lru_cache(maxsize=64)
def graph_of(config: ModelConfig) -> nnx.GraphDef:
    """The model's static graph: what nnx.merge takes besides the states."""
    return split_model(abstract_model(config))[0]


def merge_with_slots(
    config: ModelConfig, slots: dict[str, Array], parameters: nnx.State, router: nnx.State
) -> Transformer:
    """The model, with the experts in the devices' slots for each layer of "sparse" and "mtp"."""
    model = nnx.merge(graph_of(config), parameters, router)
    for part, array in slots.items():
        block = model.sparse.blocks if part == "sparse" else model.mtp.modules.block
        block.moe.slots = ExpertSlots(array)
    return model
