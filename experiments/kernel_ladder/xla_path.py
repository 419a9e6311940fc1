"""XLA's own path on a GPU that is not there: moe_jax/moe/xla.py step by step, as a range of times.

The fast end lets cuBLAS run at a large GEMM's rate and memory at its full rate. The slow end takes
the rate that is published for cuBLAS on a smaller product, whole tiles of rows, and estimates for
gathers and for the loops' reads by the host. Both have the padding up to C rows an expert, the
gathers, and the turns of both loops for the rows beyond C.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from moe_kernels.bench.shapes import Shape
from moe_kernels.predict.device import LAUNCH, Device

from experiments.kernel_ladder.program_text import Counted
from experiments.kernel_ladder.ranges import Range, Step, total
from moe_jax.moe.xla import batch_share, turn_sizes

PRODUCT_RATE_LOW = 584 / 795
"""Of a large GEMM's rate: cuBLAS on 65536 x 1024 x 1024 reaches 584 TFLOP/s on an H100, published
in facebookexperimental/triton#1038. An expert's product is no larger."""
MEMORY_RATE_LOW = 0.6
"""Of DRAM's rate, for gathers and element-wise steps. An estimate."""
TILE_ROWS = 128
"""Rows of a tile. The slow end computes whole tiles of each expert's rows."""
HOST_READ = Range(1e-5, 5e-5)
"""Seconds until the host has read whether a loop goes on. An estimate."""


class XlaStep(NamedTuple):
    """One launch of the batched part."""

    name: str
    numbers: float
    """16-bit numbers read and written."""
    flops: float = 0.0


def forward_steps(shape: Shape) -> list[XlaStep]:
    """The batched part of the forward pass. It has E times C rows, which are more than S."""
    t, d, f, e, k = shape
    rows = batch_rows(shape)
    matrix = e * d * f
    return [
        XlaStep("gather", 2 * rows * d),
        XlaStep("first product", rows * (d + 2 * f) + 2 * matrix, 4 * rows * d * f),
        XlaStep("SwiGLU", 3 * rows * f),
        XlaStep("second product", rows * (f + d) + matrix, 2 * rows * d * f),
        # The sum is float32: two numbers of 16 bits. A second launch narrows it.
        XlaStep("sum over experts", (t * k + 2 * t) * d),
        XlaStep("narrow", 3 * t * d),
    ]


def backward_steps(shape: Shape) -> list[XlaStep]:
    """The batched part of the backward pass, which keeps z alone."""
    t, d, f, e, k = shape
    rows = batch_rows(shape)
    matrix = e * d * f
    return [
        XlaStep("gather and transpose x", 2 * rows * d),
        XlaStep("gather the output's gradient", 2 * rows * d),
        XlaStep("hidden gradient", rows * (d + f) + matrix, 2 * rows * d * f),
        XlaStep("SwiGLU's gradient", 6 * rows * f),
        XlaStep("both halves in one array", 4 * rows * f),
        XlaStep("input gradient", rows * (2 * f + d) + 2 * matrix, 4 * rows * d * f),
        XlaStep("gate_up gradient", rows * (d + 2 * f) + 2 * matrix, 4 * rows * d * f),
        XlaStep("down gradient", rows * (f + d) + matrix, 2 * rows * d * f),
        XlaStep("sum over experts", (t * k + 2 * t) * d),
        XlaStep("narrow", 3 * t * d),
    ]


def batch_rows(shape: Shape) -> int:
    """Rows of the batched product, E times C."""
    assignments = shape.tokens * shape.per_token
    return shape.experts * batch_share(assignments, shape.experts, shape.tokens)


def turns(counts: Int[np.ndarray, "E"], shape: Shape) -> list[int]:
    """Turns of each loop, as moe_jax/moe/xla.py counts them."""
    share = batch_rows(shape) // shape.experts
    sizes = turn_sizes(share, shape.tokens)
    left = counts - np.minimum(counts, share)
    found = []
    for size in sizes:
        number = left // size if size != sizes[-1] else -(-left // size)
        found.append(int(number.sum()))
        left = left - np.minimum(left, number * size)
    return found


TURN_MATRICES = {"forward": 3.0, "backward": 2 + 5 / 3 + 10}
"""How often a turn moves its expert's matrices, 3 D F numbers of 16 bits.

Forward: it copies them out of the stack (read and written), and the products read the copy.
Backward: the same copy, and the products of z, of the hidden gradient and of the input's gradient
read it. Then sums in float32, which count twice: the gradients are written and read, the expert's
sum is read and written, and the stack's part is read and written in 16 bits
(moe_jax/moe/gradients.py)."""


def predict_xla(
    shape: Shape, counts: Int[np.ndarray, "E"], counted: Counted, kind: str, device: Device
) -> Step:
    """XLA's path, forward or `train`, with its launches as counted in the compiled program."""
    steps = forward_steps(shape) + (backward_steps(shape) if kind == "train" else [])
    batched = total(step_seconds(step, shape, device) for step in steps)
    others = max(0, counted.kernels - len(steps)) * LAUNCH
    parts = [batched, Range(others, others), *loop_seconds(shape, counts, counted, device)]
    seconds = total(parts)
    passes = turns(counts, shape) * (2 if kind == "train" else 1)
    note = f"padding {batch_rows(shape) / counts.sum():.2f}x, {sum(passes)} overflow turns"
    moved = 2 * sum(step.numbers for step in steps)
    return Step(seconds, seconds.low, None, moved / 1e9, note)


def step_seconds(step: XlaStep, shape: Shape, device: Device) -> Range:
    """Seconds of a launch of the batched part."""
    moved = 2 * step.numbers / device.memory
    computed = step.flops / device.gemm
    share = batch_rows(shape) // shape.experts
    tiles = -(-share // TILE_ROWS) * TILE_ROWS / share
    slow = max(moved / MEMORY_RATE_LOW, computed * tiles / PRODUCT_RATE_LOW)
    return Range(max(moved, computed) + LAUNCH, slow + LAUNCH)


def loop_seconds(
    shape: Shape, counts: Int[np.ndarray, "E"], counted: Counted, device: Device
) -> list[Range]:
    """Seconds of each loop: its turns, and its reads by the host, one more than its turns."""
    each = turns(counts, shape)
    matrices = 2 * 3 * shape.width * shape.hidden  # bytes
    found = []
    for index, kernels in enumerate(counted.turn_kernels):
        kind = "forward" if index < len(each) else "backward"
        number = each[index % len(each)]
        moved = TURN_MATRICES[kind] * matrices / device.memory
        ends = zip((moved, moved / MEMORY_RATE_LOW), HOST_READ, strict=True)
        found.append(
            Range(*(number * (kernels * LAUNCH + m) + (number + 1) * read for m, read in ends))
        )
    return found
