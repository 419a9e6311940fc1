"""Compiled calls, and rounds in which every call is timed once.

Ratios are taken between two calls of the same round (moe_jax.study.rounds). torch's OpenMP threads
spin for milliseconds after a call of torch, and slow down what follows: a GEMM of 19 ms took 26 ms.
Settings against that slow torch itself (with OMP_WAIT_POLICY=PASSIVE 80 ms became 136 ms). So there
is a pause before every call, and each library runs as its users have it.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.base.console import track
from moe_jax.study.layer_case import Inputs, Shape, layer, moe_config, with_gradients
from moe_jax.study.live_table import LiveTable
from moe_jax.study.rounds import speedup

SLOW = 2.0
"""Seconds of a call beyond which it takes part in two rounds only."""

PAUSE = 0.05
"""Seconds before each call, in which the threads of the call before go to sleep."""


@dataclass(frozen=True)
class Call:
    """Something to be timed. `run` returns when its result is there."""

    name: str
    run: Callable[[], Any]
    flops: float = 0.0
    """Useful ones."""
    temporary: int | None = None
    """Bytes that the compiled program allocates while it runs."""
    output: int | None = None
    """Bytes of its results."""

    @property
    def peak(self) -> int | None:
        """Bytes beside the arguments."""
        return None if self.temporary is None else self.temporary + (self.output or 0)


def jax_call(name: str, function: Callable[..., Any], *arguments: Any, flops: float = 0.0) -> Call:
    """A compiled call of `function`, with its memory as the compiler planned it."""
    compiled = jax.jit(function).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    return Call(
        name,
        lambda: jax.block_until_ready(compiled(*arguments)),
        flops,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
    )


def forward_and_train(
    name: str,
    function: Callable[..., Array],
    inputs: tuple[Array, tuple[Array, ...]],
    fixed: tuple[Array, ...] = (),
    flops: float = 0.0,
) -> list[Call]:
    """`NAME forward`, and `NAME train`: forward and backward. `inputs`: (cotangent, arguments).

    `fixed` are further arguments, for which there are no gradients.
    """
    forward = jax_call(f"{name} forward", function, *inputs[1], *fixed, flops=flops)
    train = jax_call(f"{name} train", with_gradients(function), *inputs, *fixed, flops=3 * flops)
    return [forward, train]


def layer_calls(
    shape: Shape, inputs: Inputs, implementation: Literal["xla", "reference"]
) -> list[Call]:
    """Both calls of the whole layer."""
    function = layer(moe_config(shape, implementation))
    both = (inputs.cotangent, inputs.arguments)
    return forward_and_train(implementation, function, both, flops=shape.flops)


def gemm_call(shape: Shape, seed: int, name: str = "gemm") -> Call:
    """The limit: a batched product [E, S/E, D] x [E, D, F], 2 S D F FLOPs."""
    share = max(1, shape.rows // shape.experts)
    random = np.random.default_rng(seed)

    def normal(*size: int) -> Array:
        return jnp.asarray(random.standard_normal(size, np.float32), shape.dtype)

    a = normal(shape.experts, share, shape.width)
    b = normal(shape.experts, shape.width, shape.hidden)
    return jax_call(name, jnp.matmul, a, b, flops=2.0 * a.size * shape.hidden)


class Times:
    """Seconds of every call in every round, NaN in rounds that left it out."""

    def __init__(self, calls: Sequence[Call], seconds: dict[str, np.ndarray]) -> None:
        self.calls = {call.name: call for call in calls}
        self.seconds = seconds

    def median(self, name: str) -> float | None:
        """Median seconds. None for a call that was not timed."""
        return float(np.nanmedian(self.seconds[name])) if name in self.seconds else None

    def spread(self, name: str) -> float:
        """Ninth decile of the seconds over the first. A busy machine has a large one."""
        first, ninth = np.nanquantile(self.seconds[name], (0.1, 0.9))
        return float(ninth / first)

    def speedup(self, name: str, over: str) -> float | None:
        """How many times as fast as `over`, the median over rounds. None if one was not timed."""
        if name not in self.seconds or over not in self.seconds:
            return None
        return speedup(self.seconds[name], self.seconds[over])

    def rate(self, name: str) -> float | None:
        """Useful FLOP/s, median."""
        seconds = self.median(name)
        return None if seconds is None else self.calls[name].flops / seconds

    def rate_of(self, name: str, limit: str = "gemm") -> float | None:
        """Useful FLOP/s as a fraction of those of `limit`, both from the same round."""
        faster = self.speedup(name, limit)
        if faster is None:
            return None
        return faster * self.calls[name].flops / self.calls[limit].flops


def timed(run: Callable[[], Any]) -> float:
    """Wall seconds of one call, after a pause."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired_rounds(calls: Sequence[Call], rounds: int, label: str = "rounds") -> Times:
    """Times every call once in turn, `rounds` times, after a call of each that is not counted.

    Calls slower than SLOW are left out after the second round.
    """
    first = {call.name: timed(call.run) for call in calls}
    seconds = {call.name: np.full(rounds, np.nan) for call in calls}
    for index in track(range(rounds), label):
        for call in calls:
            if index < 2 or first[call.name] < SLOW:
                seconds[call.name][index] = timed(call.run)
    return Times(calls, seconds)


def layer_row(table: LiveTable, section: str, name: str, times: Times, note: str = "") -> None:
    """The row of one implementation: time, share of the batched GEMM's rate, and peak bytes.

    Each is there for the forward pass and for forward and backward.
    """
    values: dict[str, float | int | None] = {}
    for kind in ("forward", "train"):
        call = f"{name} {kind}"
        seconds = times.median(call)
        peak = times.calls[call].peak if call in times.calls else None
        values[f"{kind}_ms"] = seconds and 1e3 * seconds
        values[f"{kind}_of_gemm"] = times.rate_of(call)
        values[f"{kind}_MB"] = peak and peak / 1e6
    table.row(section, name, note, **values)
