"""Compiled programs of layers and of single products, ready to be timed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_kernels.bench.peers import Layer, Peers
from moe_kernels.bench.shapes import Inputs
from moe_kernels.experts import grouped


class Program:
    """A compiled call, with the bytes that it allocates."""

    def __init__(self, compiled: Any, arguments: tuple[Array, ...]) -> None:
        self.compiled = compiled
        self.arguments = arguments
        memory = compiled.memory_analysis()
        self.bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)


def runnable(program: Any, arguments: tuple[Array, ...], name: str) -> Program | None:
    """The compiled program after one run. None where it fails, with the reason in a line.

    A peer that does not fit into memory must not end a run of hours.
    """
    try:
        call = Program(program.compile(), arguments)
        jax.block_until_ready(call())
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        print(f"{name}: left out: {str(error).splitlines()[0][:150]}", flush=True)
        return None
    return call


def layer_calls(inputs: Inputs, peers: Peers, names: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Forward, and forward with backward (`train`), of each layer that compiles and fits.

    The plan's time is part of the layer's.
    """
    calls = {}
    *arrays, experts, d_out = inputs

    def forward(layer: Layer, experts: Array, *arrays: Array) -> Array:
        return layer(*arrays, peers.make_plan(experts, len(arrays[-1])))

    def train(layer: Layer, experts: Array, d_out: Array, *arrays: Array) -> Any:
        out, pull = jax.vjp(partial(forward, layer, experts), *arrays)
        return out, pull(d_out)

    for name in names:
        layer = peers.layers[name]
        programs = {
            "forward": (forward, (experts, *arrays)),
            "train": (train, (experts, d_out, *arrays)),
        }
        for kind, (function, arguments) in programs.items():
            lowered = jax.jit(partial(function, layer)).lower(*arguments)
            call = runnable(lowered, arguments, f"{name} {kind}")
            if call:
                calls[f"{name} {kind}"] = call
    return calls


def gemm_calls(inputs: Inputs, peers: Peers, size: int) -> dict[str, Callable[[], Any]]:
    """The limit, one GEMM of size³, and single grouped products [S, D] x [E, D, 2F]."""
    square = jnp.ones((size, size), inputs.x.dtype)
    make_plan = jax.jit(peers.make_plan, static_argnums=1)
    plan = make_plan(inputs.experts, len(inputs.down))
    gathered = jax.jit(partial(grouped, gathered=True))
    return {
        "plain gemm": partial(jax.jit(jnp.matmul), square, square),
        "grouped gemm": partial(gathered, inputs.x, inputs.gate_up, plan),
    } | torch_calls(inputs)


def torch_calls(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """torch._grouped_mm on rows in expert order: one product of the up-projection's size.

    Empty where torch, its grouped product or CUDA is missing.
    """
    try:
        import torch
    except ImportError:
        return {}
    product = getattr(torch, "_grouped_mm", None)
    if product is None or not torch.cuda.is_available():
        return {}
    counts = np.bincount(np.asarray(inputs.experts).ravel(), minlength=len(inputs.down))
    ends = torch.tensor(np.cumsum(counts), dtype=torch.int32, device="cuda")
    rows = torch.randn(inputs.experts.size, inputs.x.shape[1], dtype=torch.bfloat16, device="cuda")
    matrix = torch.randn(inputs.gate_up.shape, dtype=torch.bfloat16, device="cuda")

    def call() -> None:
        product(rows, matrix, ends)
        torch.cuda.synchronize()  # jax.block_until_ready does not wait for torch's stream

    return {"torch grouped_mm": call}
