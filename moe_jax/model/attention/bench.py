"""Forward and backward of each implementation on this machine: time, ratio, temporary memory.

python -m moe_jax.model.attention.bench --length 1024
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax import Array

from moe_jax.base.errors import UserError, require
from moe_jax.config.checks import positive
from moe_jax.config.model import DType
from moe_jax.model.attention.api import IMPLEMENTATIONS
from moe_jax.model.attention.context import AttentionMask


@dataclass(frozen=True)
class Bench:
    """Sizes of one comparison."""

    length: int = 1024
    """Tokens of a sequence (L)."""
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    width: int = 64
    """Width of one head."""
    documents: int = 4
    """Documents of equal length in one sequence."""
    repeats: int = 9
    """Timings of each implementation. They alternate, so that both meet the same disturbances."""
    implementations: tuple[Literal["reference", "blockwise", "cudnn"], ...] = (
        "reference",
        "blockwise",
    )
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        sizes = ("length", "batch", "heads", "kv_heads", "width", "documents", "repeats")
        positive("", self, *sizes)
        require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}",
        )
        require(len(self.implementations) > 0, "name at least one of --implementations")


def compiled(bench: Bench, name: str, arrays: list[Array], mask: AttentionMask) -> Any:
    """The program that computes outputs and gradients by one implementation."""

    def run(query: Array, key: Array, value: Array) -> Any:
        out, pullback = jax.vjp(
            lambda *parts: IMPLEMENTATIONS[name](*parts, mask), query, key, value
        )
        return pullback(out)

    return jax.jit(run).lower(*arrays).compile()


def seconds(program: Callable[..., Any], arrays: list[Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    return time.perf_counter() - start


def main(bench: Bench) -> None:
    """Prints a line for each implementation."""
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        jax.random.normal(key, (bench.batch, bench.length, heads, bench.width), bench.dtype)
        for key, heads in zip(keys, (bench.heads, bench.kv_heads, bench.kv_heads), strict=True)
    ]
    places = jnp.arange(bench.length) * bench.documents // bench.length
    segments = jnp.broadcast_to(places, (bench.batch, bench.length))
    mask = AttentionMask(None, segments, segments)
    programs = {name: compiled(bench, name, arrays, mask) for name in bench.implementations}
    for program in programs.values():  # the first call of a program allocates its buffers
        seconds(program, arrays)
    rounds = [
        {name: seconds(program, arrays) for name, program in programs.items()}
        for _ in range(bench.repeats)
    ]
    baseline = bench.implementations[0]
    for name, program in programs.items():
        median = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[baseline] / times[name] for times in rounds)
        temporaries = program.memory_analysis().temp_size_in_bytes
        print(
            f"L={bench.length} {name}: {1e3 * median:.1f} ms, {ratio:.2f}x {baseline}, "
            f"{temporaries / 1e6:.0f} MB of temporaries"
        )


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench, description=__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
