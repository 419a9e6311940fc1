"""Compiled programs of layers and of single products, ready to be timed."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_kernels.bench.peers import Layer, Peers
from moe_kernels.bench.shapes import Inputs
from moe_kernels.errors import first_line
from moe_kernels.experts import grouped

Call = Callable[[], Any]
"""Runs a program once. Its result is an array, or something else with block_until_ready."""
KINDS = ("forward", "train")
"""Forward, and forward with backward."""


class Program:
    """A compiled call, with the bytes that it allocates."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.compiled = jax.jit(function).lower(*arguments).compile()
        self.arguments = arguments
        memory: Any = self.compiled.memory_analysis()
        self.bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes

    def __call__(self) -> Any:
        return self.compiled(*self.arguments)


def runnable(name: str, make: Callable[[], Call]) -> Call | None:
    """make(), after one run of it. None where either fails, with the reason in a line.

    Allocating, compiling and running are all inside: a peer that does not fit into memory must not
    end a run of hours.
    """
    try:
        call = make()
        jax.block_until_ready(call())
    except Exception as error:  # noqa: BLE001 - compilers and peers fail in their own ways
        print(f"{name}: left out: {first_line(error)}", flush=True)
        return None
    return call


def layer_calls(
    inputs: Inputs, peers: Peers, names: Sequence[str], kinds: Sequence[str] = KINDS
) -> dict[str, Call]:
    """The `kinds` of each layer that compiles and fits.

    The plan's time is part of the layer's.
    """
    *arrays, experts, d_out = inputs

    def forward(layer: Layer, experts: Array, *arrays: Array) -> Array:
        return layer(*arrays, peers.make_plan(experts, len(arrays[-1])))

    def train(layer: Layer, experts: Array, d_out: Array, *arrays: Array) -> Any:
        out, pull = jax.vjp(partial(forward, layer, experts), *arrays)
        return out, pull(d_out)

    programs = {
        "forward": (forward, (experts, *arrays)),
        "train": (train, (experts, d_out, *arrays)),
    }
    calls = {}
    for name in names:
        for kind in kinds:
            function, arguments = programs[kind]
            make = partial(Program, partial(function, peers.layers[name]), arguments)
            if call := runnable(f"{name} {kind}", make):
                calls[f"{name} {kind}"] = call
    return calls


def gemm_calls(inputs: Inputs, peers: Peers, size: int) -> dict[str, Call]:
    """The limit, one GEMM of size³, and single grouped products [S, D] x [E, D, 2F]."""
    makers = {
        "plain gemm": partial(plain_gemm, size, str(inputs.x.dtype)),
        "grouped gemm": partial(grouped_gemm, inputs, peers),
    }
    if importlib.util.find_spec("torch"):
        makers["torch grouped_mm"] = partial(torch_grouped, inputs)
    calls = {name: runnable(name, make) for name, make in makers.items()}
    return {name: call for name, call in calls.items() if call}


def plain_gemm(size: int, dtype: str) -> Call:
    """One GEMM of size³ on normal numbers. A card draws less power on equal ones, and is faster."""
    keys = jax.random.split(jax.random.key(0))
    pair = [jax.random.normal(key, (size, size), dtype) for key in keys]
    return Program(jnp.matmul, tuple(pair))


def grouped_gemm(inputs: Inputs, peers: Peers) -> Call:
    """The kernels' product of gathered rows, [S, D] x [E, D, 2F]."""
    plan = jax.jit(peers.make_plan, static_argnums=1)(inputs.experts, len(inputs.down))
    return Program(partial(grouped, gathered=True), (inputs.x, inputs.gate_up, plan))


class TorchStream:
    """What torch has started. JAX waits for it as for an array of its own."""

    def block_until_ready(self) -> "TorchStream":
        import torch  # pyright: ignore[reportMissingImports]

        torch.cuda.synchronize()
        return self


def torch_grouped(inputs: Inputs) -> Call:
    """torch._grouped_mm on rows in expert order: one product of the up-projection's size.

    Raises RuntimeError where torch has no grouped product or no CUDA.
    """
    import torch  # pyright: ignore[reportMissingImports]

    product = getattr(torch, "_grouped_mm", None)
    if product is None or not torch.cuda.is_available():
        raise RuntimeError("torch has no grouped product on CUDA")
    counts = np.bincount(np.asarray(inputs.experts).ravel(), minlength=len(inputs.down))
    ends = torch.tensor(np.cumsum(counts), dtype=torch.int32, device="cuda")
    rows = torch.randn(inputs.experts.size, inputs.x.shape[1], dtype=torch.bfloat16, device="cuda")
    matrix = torch.randn(inputs.gate_up.shape, dtype=torch.bfloat16, device="cuda")

    def call() -> TorchStream:
        product(rows, matrix, ends)
        return TorchStream()

    return call
