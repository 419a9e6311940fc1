"""The state of a run, and the metrics of one update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from moe_jax.base.initial import named_key, root_key
from moe_jax.config import TrainConfig
from moe_jax.model.abstract import split_model
from moe_jax.model.transformer import Transformer
from moe_jax.moe.layer import RouterStats
from moe_jax.train.optimizer import make_optimizer


class TrainState(NamedTuple):
    """Everything that an update changes, and the key that it draws from."""

    step: Int[Array, ""]
    """Updates attempted, skipped ones included. The next batch is number `step`."""
    updates: Int[Array, ""]
    """Updates applied. The learning rate follows this count, as the optimizer's own does."""
    skipped: Int[Array, ""]
    """Updates skipped in a row up to now, because loss or gradient was not finite."""
    parameters: nnx.State
    router: nnx.State
    """The RouterBias variables."""
    optimizer: optax.OptState
    key: Array
    """Key data (uint32[2]), from which the keys of steps and of sampling are derived. It never
    changes. Orbax saves plain integers, where a typed key would need a handler."""

    def model_states(self) -> tuple[nnx.State, nnx.State]:
        """(parameters, router biases): what nnx.merge takes besides the model's graph."""
        return self.parameters, self.router

    def step_key(self) -> Array:
        """The random key of the next update."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.key), self.step)


class Metrics(NamedTuple):
    """The metrics of one update. Losses are in nats per token."""

    loss: Float[Array, ""]
    """The scalar that was differentiated."""
    cross_entropy: Float[Array, ""]
    mtp: Float[Array, ""]
    balance: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    skipped: Int[Array, ""]
    router_bias: Float[Array, ""]
    """Largest absolute router bias after the update."""
    stats: dict[str, RouterStats]
    distillation: Float[Array, ""] | None = None


def model_key(config: TrainConfig) -> Array:
    """The key that the model's initial parameters are drawn from."""
    return named_key(root_key(config.seed), "model")


def new_state(config: TrainConfig, parameters: nnx.State, router: nnx.State) -> TrainState:
    """The state before the first update, with these parameters and a fresh optimizer."""
    # "steps" and model_key's "model" are independent keys of one seed.
    zero = jnp.zeros((), jnp.int32)
    optimizer = make_optimizer(config.optim, config.steps, config.continue_to).init(parameters)
    key = jax.random.key_data(named_key(root_key(config.seed), "steps"))
    return TrainState(zero, zero, zero, parameters, router, optimizer=optimizer, key=key)


def init_state(config: TrainConfig) -> TrainState:
    """The state before the first update: a pure function of the config. Jit it with shardings."""
    model = Transformer(config.model, key=model_key(config))
    _, parameters, router = split_model(model)
    return new_state(config, parameters, router)


def abstract_state(config: TrainConfig) -> TrainState:
    """Shapes and dtypes of the state. Nothing is allocated."""
    return jax.eval_shape(lambda: init_state(config))


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, abstract or not."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
