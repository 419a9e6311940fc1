"""ZB-H1, ZB-H2 and ZB-V: the backward to the weights waits until it can fill a bubble.

Source: Zero Bubble Pipeline Parallelism (arXiv:2401.10241): ZB-H1 and ZB-H2 in section 2, ZB-V in
section 6.
"""

from moe_jax.parallel.schedules.operations import (
    Order,
    PipelineSchedule,
    backward_input,
    backward_weight,
    folded,
    forward,
    require_microbatches,
    require_one_chunk,
    require_two_chunks,
    straight,
)
from moe_jax.parallel.schedules.writer import OrderWriter


def zb_h1(stages: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """1F1B whose stage r does the weights r micro-batches late. It has the memory of 1F1B."""
    require_one_chunk("zb-h1", chunks)
    orders = tuple(_late_weights(microbatches, stages - 1 - r, r) for r in range(stages))
    return PipelineSchedule("zb-h1", stages, microbatches, (straight(stages),), orders)


def zb_h2(stages: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """Twice the warm-up and twice the lateness of ZB-H1: no bubble where F = Bi = W."""
    require_one_chunk("zb-h2", chunks)
    require_microbatches("zb-h2", microbatches, 2 * stages - 1, stages)
    orders = tuple(_late_weights(microbatches, 2 * (stages - 1 - r), 2 * r) for r in range(stages))
    return PipelineSchedule("zb-h2", stages, microbatches, (straight(stages),), orders)


def _late_weights(microbatches: int, ahead: int, late: int) -> Order:
    """`ahead` forwards first, and the weights of a micro-batch `late` micro-batches later."""
    steps = [forward(m) for m in range(min(ahead, microbatches))]
    for m in range(microbatches):
        if m + ahead < microbatches:
            steps.append(forward(m + ahead))
        steps.append(backward_input(m))
        if m >= late:
            steps.append(backward_weight(m - late))
    steps += [backward_weight(m) for m in range(max(0, microbatches - late), microbatches)]
    return tuple(steps)


def zb_v(stages: int, microbatches: int, chunks: int = 2) -> PipelineSchedule:
    """Two half stages a device on a path like the letter V: no bubble with the memory of 1F1B."""
    require_two_chunks("zb-v", chunks)
    require_microbatches("zb-v", microbatches, 2 * stages - 1, stages)
    orders = tuple(_v_order(rank, stages, microbatches) for rank in range(stages))
    return PipelineSchedule("zb-v", stages, microbatches, (folded(stages),), orders)


def _v_order(rank: int, stages: int, microbatches: int) -> Order:
    """Forwards until the first gradient can arrive, then six operations in turn."""
    writer = OrderWriter((0, 0), microbatches)
    for _ in range(2 * (stages - rank) - 1):
        writer.forward(0)
    for _ in range(rank):
        writer.forward(1)
        writer.forward(0)
    for _ in range(stages - rank):
        writer.forward(1)
        writer.backward_input(1)
        writer.weight()
    while writer.forwards(1) < microbatches:
        writer.forward(0)
        writer.backward_input(0)
        writer.weight()
        writer.forward(1)
        writer.backward_input(1)
        writer.weight()
    # From here on weights wait, so that the gradients of the inputs arrive without a gap.
    for _ in range(rank):
        writer.backward_input(0)
        writer.backward_input(1)
    for _ in range(stages - rank):
        writer.backward_input(0)
        writer.weight()
    return writer.finish()
