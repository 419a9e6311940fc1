"""The layers that are compared, and the plan that they share."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe_kernels.experts import Plan, mixture
from moe_kernels.schedule import Schedule, choose_block_rows, schedule

Layer = Callable[..., Array]
"""(x [T, D], weights [T, K], gate_up [E, D, 2F], down [E, F, D], plan) -> [T, D]."""


class Peers(NamedTuple):
    """Layers by name, and the function that makes a plan of (experts [T, K], number of experts)."""

    layers: Mapping[str, Layer]
    make_plan: Callable[[Array, int], Any]


RAGGED = ("ragged_dot", "tokamax")
"""Layers by `ragged`."""


def ragged(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    gate_up: Float[Array, "E D twoF"],
    down: Float[Array, "E F D"],
    plan: Plan,
    dot: Callable[..., Array] = jax.lax.ragged_dot,
) -> Float[Array, "T D"]:
    """The layer by a sort and ragged_dot, JAX's own or another library's."""
    flat = plan.experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    rows = x[order // weights.shape[1]]
    gate, up = jnp.split(dot(rows, gate_up, plan.counts), 2, axis=1)
    y = dot(jax.nn.silu(gate) * up, down, plan.counts)
    by_token = y[jnp.argsort(order)].reshape(*weights.shape, -1)
    return jnp.einsum("tk,tkd->td", weights, by_token.astype(jnp.float32)).astype(x.dtype)


def own_plan(experts: Array, num_experts: int) -> Schedule:
    """The plan by the kernels of moe_kernels.schedule."""
    return schedule(experts, num_experts, choose_block_rows(experts.size, num_experts))


def default_peers() -> Peers:
    """The kernels, lax.ragged_dot, and tokamax's ragged_dot where that is installed."""
    layers: dict[str, Layer] = {"triton": mixture, "ragged_dot": ragged}
    if importlib.util.find_spec("tokamax"):
        import tokamax  # pyright: ignore[reportMissingImports]

        layers["tokamax"] = partial(ragged, dot=tokamax.ragged_dot)
    return Peers(layers, own_plan)


def load_peers(layers: Sequence[str], plan: str | None) -> Peers:
    """default_peers with layers of other packages, each as NAME=MODULE:FUNCTION.

    `plan`, as MODULE:FUNCTION, replaces the plan for all layers. This package knows none of them,
    so they are given by name. Raises ValueError for a name that cannot be imported.
    """
    peers = default_peers()
    named = {}
    for text in layers:
        name, _, target = text.partition("=")
        named[name] = _load(target)
    return Peers({**peers.layers, **named}, _load(plan) if plan else peers.make_plan)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{target!r} is no MODULE:FUNCTION: {error}") from error
