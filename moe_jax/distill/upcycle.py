"""Sparse upcycling: a dense model's feed-forward becomes the experts of a mixture (2212.05055).

Every expert starts as a copy of the dense feed-forward (granularity G = 1), or holds one G-th of
its hidden units (2410.07524, "virtual groups": each group of G experts is one copy). The upcycled
model computes exactly what the dense one does until training, noise or re-initialisation make the
experts differ.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.config import ModelConfig, MoEConfig, require
from moe_jax.model.abstract import abstract_states


@dataclass(frozen=True)
class UpcycleConfig:
    """How a dense model becomes sparse."""

    experts: int = 8
    """Routed experts (E), a multiple of the granularity."""
    experts_per_token: int = 2
    """Experts a token goes to (K), a multiple of the granularity."""
    granularity: int = 1
    """G: an expert has 1/G of the dense hidden width."""
    first: int = 0
    """The first so many blocks stay dense."""
    gate: str = "softmax"
    """softmax or sigmoid."""
    noise: float = 0.0
    """Experts' weights + noise · their standard deviation · N(0, 1). Above 0 the model is no longer
    exactly the dense one."""
    reinitialised: float = 0.0
    """Fraction of each expert's hidden units drawn anew with the weights' mean and standard
    deviation (Drop-Upcycling, 2502.19261); not exact either."""
    seed: int = 0

    def __post_init__(self) -> None:
        owner, g = "upcycle", self.granularity
        require(g > 0, f"{owner}.granularity is {g}: it must be positive")
        for name in ("experts", "experts_per_token"):
            value = getattr(self, name)
            require(value % g == 0, f"{owner}.{name}={value} is not a multiple of granularity={g}")
        require(self.gate in ("softmax", "sigmoid"), f"{owner}.gate '{self.gate}' is unknown")
        require(self.noise >= 0, f"{owner}.noise is {self.noise}: it must not be negative")
        require(
            0 <= self.reinitialised <= 1,
            f"{owner}.reinitialised is {self.reinitialised}: it must lie between 0 and 1",
        )


def sparse_config(dense: ModelConfig, config: UpcycleConfig) -> ModelConfig:
    """The upcycled model's settings. UserError: `dense` is not dense, or sizes do not divide.

    The K chosen experts are K/G whole copies. Normalised gates give the G parts of copy c the
    weight w_c / G each, sum w_c = 1, so that scale = G makes the whole one feed-forward.
    """
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
        scale=float(g),
        bias_rate=0.001 if config.gate == "sigmoid" else 0.0,
    )
    return replace(dense, dense_layers=config.first, moe=moe)


def upcycle(
    dense: ModelConfig, parameters: Any, config: UpcycleConfig
) -> tuple[ModelConfig, Any, Any]:
    """(config, parameters, router) of the mixture-of-experts model. Errors as sparse_config.

    The optimizer starts afresh: its moments belong to other parameters.
    """
    model = sparse_config(dense, config)
    abstract, router = abstract_states(model)
    old = nnx.to_pure_dict(parameters)
    blocks = old["dense"]["blocks"]
    new = {k: v for k, v in old.items() if k != "dense"}
    if config.first:
        new["dense"] = {"blocks": jax.tree.map(lambda a: a[: config.first], blocks)}
    kept = jax.tree.map(lambda a: a[config.first :], blocks)
    new["sparse"] = {"blocks": _sparse_blocks(kept, model, config)}
    nnx.replace_by_pure_dict(abstract, new)
    return model, abstract, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), router)


def _sparse_blocks(blocks: dict, model: ModelConfig, config: UpcycleConfig) -> dict:
    feed_forward = blocks["feed_forward"]
    keys = iter(jax.random.split(jax.random.key(config.seed), 8))
    gate_up, down = feed_forward["gate_up"]["weight"], feed_forward["down"]["weight"]
    gate, up = jnp.split(gate_up, 2, axis=-1)
    # [layers, E, D or F', F' or D]; units of all three matrices are the columns of gate and up.
    gate, up, down = (_experts(w, config) for w in (gate, up, jnp.swapaxes(down, 1, 2)))
    if config.reinitialised:
        fresh = jax.random.uniform(next(keys), gate[:, :, :1].shape) < config.reinitialised
        gate, up, down = (_redrawn(w, fresh, next(keys)) for w in (gate, up, down))
    if config.noise:
        gate, up, down = (_noisy(w, config.noise, next(keys)) for w in (gate, up, down))
    moe = {
        "router": _router(next(keys), gate.shape[0], model, config).astype(gate.dtype),
        "gate_up": jnp.concatenate([gate, up], axis=-1),
        "down": jnp.swapaxes(down, 2, 3),
    }
    return {k: v for k, v in blocks.items() if k != "feed_forward"} | {"moe": moe}


def _experts(matrix: Array, config: UpcycleConfig) -> Array:
    """[layers, D, F] -> [layers, E, D, F/G]: expert e has the shard e mod G of the units."""
    layers, width, hidden = matrix.shape
    g = config.granularity
    shards = matrix.reshape(layers, width, g, hidden // g).transpose(0, 2, 1, 3)
    return jnp.tile(shards, (1, config.experts // g, 1, 1))


def _router(key: Array, layers: int, model: ModelConfig, config: UpcycleConfig) -> Array:
    """[layers, D, E]: drawn once a virtual group, so that the G experts of a copy tie and are
    chosen together (top-k gives ties to the lower index, and they are neighbours)."""
    groups = config.experts // config.granularity
    drawn = model.init_std * jax.random.normal(key, (layers, model.width, groups))
    return jnp.repeat(drawn, config.granularity, axis=-1)


def _redrawn(units: Array, fresh: Array, key: Array) -> Array:
    """Replaces the chosen units by a normal draw of the matrix's mean and standard deviation."""
    axes = (-2, -1)
    mean, std = units.mean(axes, keepdims=True), units.std(axes, keepdims=True)
    return jnp.where(fresh, mean + std * jax.random.normal(key, units.shape), units)


def _noisy(units: Array, noise: float, key: Array) -> Array:
    std = units.std((-2, -1), keepdims=True)
    return units + noise * std * jax.random.normal(key, units.shape)
