"""Sparse upcycling: a dense model's feed-forward becomes the experts of a mixture (2212.05055).

Every expert starts as a copy of the dense feed-forward (granularity G = 1), or has one G-th of its
hidden units (2410.07524, "virtual groups": each group of G experts is one copy). The upcycled model
computes exactly what the dense one does, until training, noise or re-initialisation make the
experts differ.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from moe_jax.base.initial import root_key
from moe_jax.base.seeds import check_seed
from moe_jax.config import ModelConfig, MoEConfig, require
from moe_jax.interop.assemble import arrays_by_name, as_parameters
from moe_jax.model.abstract import abstract_states
from moe_jax.model.parameters import role_of

DENSE = "dense.blocks."
SPARSE = "sparse.blocks."


@dataclass(frozen=True)
class UpcycleConfig:
    """How a dense model becomes sparse."""

    experts: int = 8
    """Routed experts (E), a multiple of the granularity."""
    experts_per_token: int = 2
    """Experts of each token (K), a multiple of the granularity."""
    granularity: int = 1
    """G: an expert has 1/G of the dense hidden width."""
    first: int = 0
    """Number of blocks, from the first on, that stay dense."""
    gate: str = "softmax"
    """softmax or sigmoid."""
    noise: float = 0.0
    """Experts' weights + noise · their standard deviation · N(0, 1). Above 0, the model no longer
    computes exactly what the dense one does."""
    reinitialised: float = 0.0
    """Fraction of each expert's hidden units drawn anew with the weights' mean and standard
    deviation (Drop-Upcycling, 2502.19261). Not exact above 0, either."""
    seed: int = 0

    def __post_init__(self) -> None:
        g = self.granularity
        require(g > 0, f"upcycle.granularity is {g}: it must be positive")
        for name in ("experts", "experts_per_token"):
            value = getattr(self, name)
            require(value % g == 0, f"upcycle.{name}={value} is not a multiple of granularity={g}")
        require(self.gate in ("softmax", "sigmoid"), f"upcycle.gate '{self.gate}' is unknown")
        check_seed("upcycle.seed", self.seed)
        require(self.noise >= 0, f"upcycle.noise is {self.noise}: it must not be negative")
        require(
            0 <= self.reinitialised <= 1,
            f"upcycle.reinitialised is {self.reinitialised}: it must lie between 0 and 1",
        )


def sparse_config(dense: ModelConfig, config: UpcycleConfig) -> ModelConfig:
    """The upcycled model's settings. UserError: `dense` is not dense, or sizes do not divide."""
    require(dense.moe_layers == 0, "only a dense model can be upcycled: dense_layers < layers")
    require(dense.mtp_depth == 0, "upcycling a model with multi-token prediction is not supported")
    require(
        0 <= config.first < dense.layers,
        f"upcycle.first={config.first} leaves no block of {dense.layers} to upcycle",
    )
    g = config.granularity
    require(
        dense.dense_hidden % g == 0,
        f"upcycle.granularity={g} does not divide dense_hidden={dense.dense_hidden}",
    )
    moe = MoEConfig(
        experts=config.experts,
        experts_per_token=config.experts_per_token,
        expert_hidden=dense.dense_hidden // g,
        shared_experts=0,
        gate=config.gate,  # pyright: ignore
        normalise=True,
        # The K chosen experts are K/G whole copies. Normalised gates give each of the G parts of
        # copy c the weight w_c / G, sum w_c = 1, so that G times their sum is one feed-forward.
        scale=float(g),
        bias_rate=0.001 if config.gate == "sigmoid" else 0.0,
    )
    return replace(dense, dense_layers=config.first, moe=moe)


def upcycle(
    dense: ModelConfig, parameters: Any, config: UpcycleConfig
) -> tuple[ModelConfig, Any, Any]:
    """(config, parameters, router) of the mixture-of-experts model. Errors as sparse_config.

    The optimizer starts afresh, because its moments belong to other parameters.
    """
    model = sparse_config(dense, config)
    upcycled: dict[str, Array] = {}
    feed_forward: dict[str, Array] = {}
    for name, array in arrays_by_name(parameters).items():
        path = name.removeprefix(DENSE)
        if path == name:  # outside of the blocks
            upcycled[name] = array
            continue
        if config.first:
            upcycled[name] = array[: config.first]
        if role_of(name) == "feed_forward":
            matrix = "down" if ".down." in name else "gate_up"
            feed_forward[matrix] = array[config.first :]
        else:
            upcycled[SPARSE + path] = array[config.first :]
    experts = _mixture(feed_forward["gate_up"], feed_forward["down"], model, config)
    upcycled |= {f"{SPARSE}moe.{name}": array for name, array in experts.items()}
    _, router = abstract_states(model)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), router)
    return model, as_parameters(model, upcycled), zeros


def _mixture(
    gate_up: Float[Array, "layers D _"],
    down: Float[Array, "layers _ D"],
    model: ModelConfig,
    config: UpcycleConfig,
) -> dict[str, Array]:
    """The parameters of the mixtures of all layers, from their dense feed-forwards."""
    keys = iter(jax.random.split(root_key(config.seed), 8))
    gate, up = jnp.split(gate_up, 2, axis=-1)
    # With `down` transposed, a hidden unit is a column of all three matrices.
    matrices = [_experts(matrix, config) for matrix in (gate, up, jnp.swapaxes(down, 1, 2))]
    if config.reinitialised:
        # A unit is new in all three matrices or in none, whence the one mask.
        fresh = jax.random.uniform(next(keys), matrices[0][:, :, :1].shape) < config.reinitialised
        matrices = [_redrawn(matrix, fresh, next(keys)) for matrix in matrices]
    if config.noise:
        matrices = [_noisy(matrix, config.noise, next(keys)) for matrix in matrices]
    gate, up, down = matrices
    return {
        "router": _router(next(keys), len(gate), model, config).astype(gate.dtype),
        "gate_up": jnp.concatenate([gate, up], axis=-1),
        "down": jnp.swapaxes(down, 2, 3),
    }


def _experts(
    matrix: Float[Array, "layers D _"], config: UpcycleConfig
) -> Float[Array, "layers E D F"]:
    """Expert e gets part e mod G of the G·F hidden units."""
    layers, width, hidden = matrix.shape
    g = config.granularity
    parts = matrix.reshape(layers, width, g, hidden // g).transpose(0, 2, 1, 3)
    return jnp.tile(parts, (1, config.experts // g, 1, 1))


def _router(
    key: Array, layers: int, model: ModelConfig, config: UpcycleConfig
) -> Float[Array, "layers D E"]:
    """One draw for each virtual group, so that the G experts of a copy have equal scores."""
    groups = config.experts // config.granularity
    drawn = model.init_std * jax.random.normal(key, (layers, model.width, groups))
    # Experts of a copy are neighbours, and top-k takes the lower index of a tie: with K a multiple
    # of G, they are chosen together.
    return jnp.repeat(drawn, config.granularity, axis=-1)


def _redrawn(
    units: Float[Array, "layers E D F"], fresh: Bool[Array, "layers E 1 F"], key: Array
) -> Float[Array, "layers E D F"]:
    """The fresh units replaced by a normal draw of the matrix's mean and standard deviation."""
    axes = (-2, -1)
    mean = units.mean(axes, keepdims=True)
    std = units.std(axes, keepdims=True)
    return jnp.where(fresh, mean + std * jax.random.normal(key, units.shape), units)


def _noisy(
    units: Float[Array, "layers E D F"], noise: float, key: Array
) -> Float[Array, "layers E D F"]:
    std = units.std((-2, -1), keepdims=True)
    return units + noise * std * jax.random.normal(key, units.shape)
