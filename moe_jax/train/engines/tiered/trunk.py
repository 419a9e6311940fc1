"""The state of a tiered run without its routed experts (the trunk), and the two put together.

The trunk is every parameter but the routed experts' matrices of the sparse blocks. The module of
multi-token prediction, with its own experts, belongs to it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Int

from moe_jax.config import TrainConfig
from moe_jax.model.block import Block
from moe_jax.model.transformer import Transformer
from moe_jax.moe.layer import RouterBias
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.step import TrainState

EXPERT = ("down", "gate_up")
"""An expert's matrices in the order of every tuple of them here: that of a sorted tree."""
Matrices = tuple[Array, ...]
"""down [n, F, D], gate_up [n, D, 2F]."""
_HOME = ("sparse", "blocks", "moe")


def without_experts(parameters: nnx.State) -> nnx.State:
    """The trunk's parameters."""
    flat = nnx.to_flat_state(parameters)
    return nnx.from_flat_state([(path, leaf) for path, leaf in flat if not _is_expert(path)])


def with_experts(trunk: nnx.State, matrices: tuple[Any, ...]) -> nnx.State:
    """`trunk` with the stacked experts [layers, E, …] (or anything in their place)."""
    flat = list(nnx.to_flat_state(trunk))
    flat += [((*_HOME, name), nnx.Param(m)) for name, m in zip(EXPERT, matrices, strict=True)]
    return nnx.from_flat_state(flat)


def _is_expert(path: tuple[Any, ...]) -> bool:
    return path[:3] == _HOME and path[3] in EXPERT


def of_expert(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of an optimizer's state belongs to the routed experts' matrices."""
    names = [str(getattr(entry, "key", entry)) for entry in path]
    return any(_is_expert(tuple(names[i : i + 4])) for i in range(len(names) - 3))


def init_trunk(config: TrainConfig) -> TrainState:
    """init_state without the experts (jit it: their initialisation is then left out)."""
    model_key, sample_key = jax.random.split(jax.random.key(config.seed))
    model = Transformer(config.resolved_model(), rngs=nnx.Rngs(params=model_key))
    _, parameters, router = nnx.split(model, nnx.Param, RouterBias)
    trunk = without_experts(parameters)
    optimizer = make_optimizer(config.optim, config.steps, clip=False).init(trunk)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, trunk, router, optimizer, jax.random.key_data(sample_key))


def init_experts(config: TrainConfig, layer: Int[Array, ""]) -> Matrices:
    """The experts of one sparse block, [E, …], as init_state makes them."""
    model = config.resolved_model()
    rngs = nnx.Rngs(params=jax.random.split(jax.random.key(config.seed))[0])
    # What Transformer draws before the sparse stack: embedding, head, dense stack.
    for _ in range(1 + (not model.tied_embedding) + (model.dense_layers > 0)):
        rngs.params()
    keys = jax.random.split(rngs.params(), model.moe_layers)
    block = Block(model, sparse=True, rngs=nnx.Rngs(params=keys[layer]))
    return tuple(getattr(block.moe, name)[...] for name in EXPERT)


def assemble(whole: TrainState, trunk: TrainState, rows: Callable[[str], list[Any]]) -> TrainState:
    """The state of the ordinary path: `whole` gives its form (abstract), `trunk` all but the
    experts, rows("parameters" | "moments") their stacked parts [layers, E, …]."""
    parameters = with_experts(trunk.parameters, tuple(rows("parameters")))
    parts, rest = iter(rows("moments")), iter(jax.tree.leaves(trunk.optimizer))
    leaves, form = jax.tree_util.tree_flatten_with_path(whole.optimizer)
    filled = [next(parts) if of_expert(path) else next(rest) for path, _ in leaves]
    return trunk._replace(parameters=parameters, optimizer=jax.tree.unflatten(form, filled))
