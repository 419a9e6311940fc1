"""DualPipe and DualPipeV of DeepSeek-V3: forwards of some micro-batches under backwards of others.

Source: the order in deepseek-ai/DualPipe, whose eight steps have the same numbers here, and the
DeepSeek-V3 report (arXiv:2412.19437, section 3.2.1).
"""

from moe_jax.base.errors import require
from moe_jax.parallel.schedules.operations import (
    Order,
    PipelineSchedule,
    folded,
    require_microbatches,
    require_two_chunks,
    straight,
)
from moe_jax.parallel.schedules.writer import OrderWriter


def dualpipe(stages: int, microbatches: int, chunks: int = 2) -> PipelineSchedule:
    """Two pipelines against each other: device r has stage r of one, P-1-r of the other."""
    require_two_chunks("dualpipe", chunks)
    require(stages % 2 == 0, f"dualpipe needs an even number of stages, not {stages}")
    require_microbatches("dualpipe", microbatches, 2 * stages, stages)
    require(
        microbatches % 2 == 0,
        f"dualpipe needs an even number of micro-batches, not {microbatches}",
    )
    half = microbatches // 2
    down = straight(stages)
    up = tuple(place._replace(chunk=1) for place in reversed(down))

    def order(rank: int) -> Order:
        # Seen from the second half of the devices, the other direction is the one that begins.
        near = int(rank >= stages // 2)
        writer = OrderWriter((0, half), half)
        return _eight_steps(writer, min(rank, stages - 1 - rank), stages // 2, half, near)

    orders = tuple(order(rank) for rank in range(stages))
    return PipelineSchedule("dualpipe", stages, microbatches, (down, up), orders)


def dualpipev(stages: int, microbatches: int, chunks: int = 2) -> PipelineSchedule:
    """Half of DualPipe, folded: P stages on P/2 devices, device r has stages r and P-1-r."""
    require_two_chunks("dualpipev", chunks)
    require(stages % 2 == 0, f"dualpipev needs an even number of stages, not {stages}")
    require_microbatches("dualpipev", microbatches, stages, stages)
    devices = stages // 2
    orders = tuple(
        _eight_steps(OrderWriter((0, 0), microbatches), rank, devices, microbatches, 0)
        for rank in range(devices)
    )
    return PipelineSchedule("dualpipev", stages, microbatches, (folded(devices),), orders)


def _eight_steps(writer: OrderWriter, rank: int, middle: int, count: int, near: int) -> Order:
    """The order of a device that is `rank` from the end and whose half has `middle` devices.

    Chunk `near` is early in the model and the other one, `far`, is late. Each has `count`
    micro-batches.
    """
    far = 1 - near
    to_middle = middle - rank - 1
    _fill(writer, near, far, to_middle, rank + 1)
    for number in range(count - 2 * middle + rank + 1):  # step 4
        if number == 0 and to_middle == 0:
            # Its neighbours wait for this output. A pair would end later than a forward alone.
            writer.forward(near)
            writer.backward(far)
        else:
            writer.overlapped(near, far)
        writer.overlapped(far, near)
    for _ in range(to_middle):  # step 5
        writer.backward(far)
        writer.overlapped(far, near)
    _drain(writer, near, far, to_middle, rank + 1)
    return writer.finish()  # step 8


def _fill(writer: OrderWriter, near: int, far: int, to_middle: int, to_end: int) -> None:
    """Steps 1 to 3."""
    for _ in range(2 * to_middle):
        writer.forward(near)
    for _ in range(to_end):
        writer.forward(near)
        writer.forward(far)
    for _ in range(to_middle):
        writer.backward_input(far)
        writer.weight()
        writer.forward(far)


def _drain(writer: OrderWriter, near: int, far: int, to_middle: int, to_end: int) -> None:
    """Steps 6 and 7."""
    for number in range(2 * to_end):
        chunk = near if number % 2 else far
        # The second half of them leaves the weights for the gaps that come.
        if number < to_end:
            writer.backward(chunk)
        else:
            writer.backward_input(chunk)
    for _ in range(to_middle):
        writer.weight()
        writer.backward_input(near)
