"""Rung 0: jax.lax.ragged_dot, what JAX users have today, on a GPU that is not there.

XLA expands it to a dense product. Each row is written E times, once for every expert and as zeros
but for its own, and the product runs over all E experts. The FLOPs are counted from the compiled
program (compiled.py): exactly E times those of the layer.
"""

from typing import NamedTuple

from moe_kernels.bench.shapes import Shape
from moe_kernels.predict.device import LAUNCH, Device

from experiments.kernel_ladder.program_text import Counted
from experiments.kernel_ladder.ranges import Range, Step
from experiments.kernel_ladder.xla_path import MEMORY_RATE_LOW, PRODUCT_RATE_LOW

DEVICE_MEMORY = 80e9
"""Bytes of an H100 or an A100 with 80 GB."""


class PublishedGain(NamedTuple):
    """A measured gain of Triton kernels over lax.ragged_dot."""

    name: str
    ratio: float
    what: str
    source: str


PUBLISHED = (
    PublishedGain(
        "forward", 5.2, "one grouped product on one H100, 78% of peak against 15%",
        "marin-community/marin#4297",
    ),
    PublishedGain(
        "forward_and_backward", 1.9, "a layer on 8 H100, 6.61 ms against 12.67 ms",
        "marin-community/marin#5330",
    ),
    PublishedGain(
        "train_step", 3.1, "a training step on 8 H100, 0.171 s against 0.530 s",
        "marin-community/marin#5350",
    ),
)  # fmt: skip
"""The first was measured with an earlier XLA. 15% of an H100's peak is more than a dense expansion
over six groups can reach. On a B200 with jaxlib 0.10.2 ragged_dot reaches 23 TFLOP/s with 64
experts, 64 times below other kernels (marin-community/marin#7012)."""


def expanded_numbers(shape: Shape, kind: str) -> float:
    """Numbers of all expanded operands.

    Forward the rows of both products, [S, E D] and [S, E F]. Backward those of both products with
    transposed matrices, [S, E D] and [S, E 2F], and the rows whose outer products are the matrices'
    gradients, [E, S, D] and [E, S, F].
    """
    widths = shape.width + shape.hidden
    if kind == "train":
        widths += shape.width + 2 * shape.hidden + shape.width + shape.hidden
    return float(shape.tokens * shape.per_token * shape.experts * widths)


def predict_ragged(shape: Shape, counted: Counted, kind: str, device: Device) -> Step:
    """ragged_dot's layer, forward or `train`, from the FLOPs and launches that were counted."""
    computed = counted.flops / device.gemm
    # Written once and read once, two bytes a number.
    moved = 4 * expanded_numbers(shape, kind)
    launches = counted.kernels * LAUNCH
    fast = computed + moved / device.memory + launches
    slow = computed / PRODUCT_RATE_LOW + moved / device.memory / MEMORY_RATE_LOW + launches
    passes = 3 if kind == "train" else 1
    expansion = counted.flops / (passes * shape.flops)
    note = f"{expansion:.0f}x the FLOPs, {counted.temporary_bytes / 1e9:.0f} GB of temporaries"
    left_out = f"{note} do not fit into 80 GB" if counted.temporary_bytes > DEVICE_MEMORY else ""
    return Step(Range(fast, slow), fast, None, moved / 1e9, note, left_out)
