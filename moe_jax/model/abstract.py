"""The model without memory: its static graph, and the shapes of its parameters."""

from functools import lru_cache

import jax
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model.block import Block
from moe_jax.model.transformer import Transformer
from moe_jax.moe.module import RouterBias


def abstract_model(config: ModelConfig) -> Transformer:
    """Transformer(config) whose arrays are shapes and dtypes: a second for 671B parameters."""
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


@lru_cache(maxsize=64)
def graph_of(config: ModelConfig) -> nnx.GraphDef:
    """The model's static graph."""
    return split_model(abstract_model(config))[0]
