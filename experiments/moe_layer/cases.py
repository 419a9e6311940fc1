"""What the moe_layer experiment times: shapes, inputs, calls, and rounds in which each is timed."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from rich.progress import track

from moe_jax.config import MoEConfig
from moe_jax.moe.layer import Parameters, moe_layer

SLOW = 2.0
"""Seconds of a call beyond which it takes part in two rounds only."""

PAUSE = 0.05
"""Seconds before each call, in which the threads of the call before go to sleep."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer: T, D, F, E, K."""

    tokens: int
    width: int
    hidden: int
    experts: int
    per_token: int
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = (self.tokens, self.width, self.hidden, self.experts, self.per_token)
        return " ".join(f"{k}={v}" for k, v in zip("TDFEK", sizes, strict=True))

    @property
    def rows(self) -> int:
        """S = T·K."""
        return self.tokens * self.per_token

    @property
    def flops(self) -> float:
        """Useful FLOPs of the experts, forward: 6 S D F. Forward and backward: three times that."""
        return 6.0 * self.rows * self.width * self.hidden

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's matrices, 3 D F numbers."""
        return 3 * self.width * self.hidden * jnp.dtype(self.dtype).itemsize


class Inputs(NamedTuple):
    """Random arrays of a layer call; their scale keeps all activations near 1."""

    x: Float[Array, "T D"]
    router: Float[Array, "D E"]
    gate_up: Float[Array, "E D twoF"]
    down: Float[Array, "E F D"]
    cotangent: Float[Array, "T D"]

    @property
    def arguments(self) -> tuple[Array, Array, Array, Array]:
        """What the layer takes, and has gradients for."""
        return self.x, self.router, self.gate_up, self.down


def make_inputs(shape: Shape, seed: int) -> Inputs:
    """Normal arrays; the matrices divided by the root of their inputs' width. Router in float32."""
    t, d, f, e = shape.tokens, shape.width, shape.hidden, shape.experts
    random = np.random.default_rng(seed)

    def normal(*size: int, divisor: float = 1.0, dtype: str = shape.dtype) -> Array:
        numbers = random.standard_normal(size, np.float32) / np.float32(divisor)
        return jnp.asarray(numbers, dtype)

    return Inputs(
        x=normal(t, d),
        router=normal(d, e, divisor=d**0.5, dtype="float32"),
        gate_up=normal(e, d, 2 * f, divisor=d**0.5),
        down=normal(e, f, d, divisor=f**0.5),
        cotangent=normal(t, d),
    )


def moe_config(shape: Shape, implementation: Literal["xla", "reference"] = "xla") -> MoEConfig:
    """A sigmoid gate without any balance loss, so that the layer alone is timed."""
    return MoEConfig(
        experts=shape.experts,
        experts_per_token=shape.per_token,
        expert_hidden=shape.hidden,
        sequence_loss=0.0,
        implementation=implementation,
    )


def layer(config: MoEConfig) -> Callable[[Array, Array, Array, Array], Array]:
    """Router, route, plan and experts: (x, router, gate_up, down) -> outputs [T, D]."""

    def run(x: Array, router: Array, gate_up: Array, down: Array) -> Array:
        parameters = Parameters(router, jnp.zeros(config.experts), gate_up, down)
        (out, _), _ = moe_layer(x[None], parameters, config)
        return out[0]

    return run


def with_gradients(function: Callable[..., Array]) -> Callable[..., Any]:
    """(cotangent, arguments, *fixed) -> (outputs, gradients of the arguments).

    The outputs are returned as well: without them XLA leaves out what only they need.
    """

    def run(cotangent: Array, arguments: tuple[Array, ...], *fixed: Array) -> Any:
        out, pull = jax.vjp(lambda *a: function(*a, *fixed), *arguments)
        return out, pull(cotangent)

    return run


@dataclass(frozen=True)
class Call:
    """Something to be timed: `run` returns when its result is there."""

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
    """`NAME forward`, and `NAME train`: forward and backward. inputs: (cotangent, arguments)."""
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
    e, d, f = shape.experts, shape.width, shape.hidden
    share = max(1, shape.rows // e)
    random = np.random.default_rng(seed)
    a = jnp.asarray(random.standard_normal((e, share, d), np.float32), shape.dtype)
    b = jnp.asarray(random.standard_normal((e, d, f), np.float32), shape.dtype)
    return jax_call(name, jnp.matmul, a, b, flops=2.0 * e * share * d * f)


class Times:
    """Seconds of every call in every round; NaN where it was left out."""

    def __init__(self, calls: Sequence[Call], seconds: dict[str, np.ndarray]) -> None:
        self.calls = {call.name: call for call in calls}
        self.seconds = seconds

    def median(self, name: str) -> float | None:
        """Median seconds; None for a call that does not exist."""
        return float(np.nanmedian(self.seconds[name])) if name in self.seconds else None

    def spread(self, name: str) -> float:
        """Ninth decile of the seconds by the first: how little quiet the machine was."""
        first, ninth = np.nanquantile(self.seconds[name], (0.1, 0.9))
        return float(ninth / first)

    def speedup(self, name: str, over: str) -> float | None:
        """How many times as fast as `over`: median over rounds of the ratio within a round."""
        if name not in self.seconds or over not in self.seconds:
            return None
        return float(np.nanmedian(self.seconds[over] / self.seconds[name]))

    def rate(self, name: str) -> float | None:
        """Useful FLOP/s, median."""
        seconds = self.median(name)
        return None if seconds is None else self.calls[name].flops / seconds

    def rate_of(self, name: str, limit: str = "gemm") -> float | None:
        """Useful FLOP/s as a fraction of those of `limit`, both from the same round."""
        speedup = self.speedup(name, limit)
        return speedup and speedup * self.calls[name].flops / self.calls[limit].flops


def timed(run: Callable[[], Any]) -> float:
    """Wall seconds of one call, after a pause."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def paired_rounds(calls: Sequence[Call], rounds: int, label: str = "rounds") -> Times:
    """Times every call once in turn, `rounds` times, after a call of each that is not counted.

    What disturbs the machine for a while disturbs all calls of a round, and ratios are taken
    within one. Calls slower than SLOW are left out after the second round.
    """
    first = {call.name: timed(call.run) for call in calls}
    seconds = {call.name: np.full(rounds, np.nan) for call in calls}
    for index in track(range(rounds), label, transient=True, disable=not sys.stdout.isatty()):
        for call in calls:
            if index < 2 or first[call.name] < SLOW:
                seconds[call.name][index] = timed(call.run)
    return Times(calls, seconds)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of the power law y = c x^p: least squares in log-log."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def show(value: float | int | None) -> str:
    """Four digits, or a dash for nothing."""
    return "-" if value is None else f"{value:,.4g}"


class Table:
    """Prints rows as soon as they are measured, and appends them to metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: tuple[str, ...] = ()
        path.write_text("")

    def row(self, section: str, name: str, note: str = "", **values: float | int | None) -> None:
        """One line; a heading comes first where the columns change."""
        if (section, *values) != self.columns:
            self.columns = (section, *values)
            print(f"\n{section}\n{'':26}" + "".join(f"{column:>17}" for column in values))
        cells = "".join(f"{show(value):>17}" for value in values.values())
        print(f"{name:26}{cells}  {note}".rstrip(), flush=True)
        line = {"section": section, "name": name, "note": note, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def layer(self, section: str, name: str, times: Times, note: str = "") -> None:
        """One implementation: time, rate of the batched GEMM, peak bytes; both directions."""
        values: dict[str, float | int | None] = {}
        for kind in ("forward", "train"):
            call = f"{name} {kind}"
            seconds = times.median(call)
            peak = times.calls[call].peak if call in times.calls else None
            values[f"{kind}_ms"] = seconds and 1e3 * seconds
            values[f"{kind}_of_gemm"] = times.rate_of(call)
            values[f"{kind}_MB"] = peak and peak / 1e6
        self.row(section, name, note, **values)
