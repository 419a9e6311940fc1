"""Bytes that a layer keeps between its forward and its backward pass."""

from typing import Any

import jax
from jax import Array

from moe_kernels.bench.peers import Layer, Peers
from moe_kernels.bench.programs import runnable
from moe_kernels.bench.shapes import Inputs, Shape, make_inputs


def kept_formula(shape: Shape, itemsize: int) -> int:
    """x [T, D] and the pre-activation z [S, 2F], without padding: (T D + 2 S F) numbers."""
    rows = shape.tokens * shape.per_token
    return itemsize * (shape.tokens * shape.width + 2 * rows * shape.hidden)


def measure_memory(shape: Shape, dtype: str, peers: Peers) -> dict[str, dict[str, Any]]:
    """By layer: `kept` bytes, the `formula`'s, and the device's peak where it counts it.

    Kept is x and every array that the backward pass holds beside the layer's other inputs.
    Parameters are held anyway. The plan, padding and the gate's weights come on top of the formula.
    """
    inputs = make_inputs(shape, dtype)
    plan = jax.jit(peers.make_plan, static_argnums=1)(inputs.experts, shape.experts)
    formula = kept_formula(shape, inputs.x.dtype.itemsize)
    rows = {}
    for name, layer in peers.layers.items():
        found: dict[str, Any] = {"formula": formula}

        def once(layer: Layer = layer, found: dict[str, Any] = found) -> Any:
            found["kept"] = kept_bytes(layer, inputs, plan)
            return lambda: None

        if runnable(f"{name} memory", once):
            rows[name] = {**found, "peak_of_process": _peak()}
    return rows


def kept_bytes(layer: Layer, inputs: Inputs, plan: Any) -> int:
    """x, and what the backward pass holds that is no input, in bytes."""
    arrays = (inputs.x, inputs.weights, inputs.gate_up, inputs.down)
    _, pull = jax.vjp(jax.jit(lambda *a: layer(*a, plan)), *arrays)
    held = {leaf.unsafe_buffer_pointer(): leaf for leaf in _arrays(pull)}
    for array in _arrays((arrays, plan)):
        held.pop(array.unsafe_buffer_pointer(), None)
    return inputs.x.nbytes + sum(leaf.nbytes for leaf in held.values())


def _arrays(tree: Any) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, Array)]


def _peak() -> int | None:
    statistics = jax.devices()[0].memory_stats()
    return statistics.get("peak_bytes_in_use") if statistics else None
