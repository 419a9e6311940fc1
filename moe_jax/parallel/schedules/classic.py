"""GPipe, 1F1B and interleaved 1F1B: schedules with a whole backward.

Sources: GPipe (arXiv:1811.06965), 1F1B of PipeDream-Flush (arXiv:2006.09503), interleaved 1F1B of
Megatron-LM (arXiv:2104.04473, section 2.2).
"""

from moe_jax.base.errors import require
from moe_jax.parallel.schedules.operations import (
    Order,
    PipelineSchedule,
    backward,
    forward,
    require_one_chunk,
    straight,
)


def gpipe(stages: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """All forwards, then all backwards."""
    require_one_chunk("gpipe", chunks)
    forwards = tuple(forward(m) for m in range(microbatches))
    backwards = tuple(backward(m) for m in range(microbatches))
    orders = (forwards + backwards,) * stages
    return PipelineSchedule("gpipe", stages, microbatches, (straight(stages),), orders)


def one_forward_one_backward(stages: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """As many forwards as there are later stages, then one forward and one backward in turn."""
    require_one_chunk("1f1b", chunks)

    def order(rank: int) -> Order:
        numbers = range(microbatches)
        forwards = tuple(forward(m) for m in numbers)
        backwards = tuple(backward(m) for m in numbers)
        return in_turn(forwards, backwards, stages - 1 - rank)

    orders = tuple(order(rank) for rank in range(stages))
    return PipelineSchedule("1f1b", stages, microbatches, (straight(stages),), orders)


def interleaved(stages: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """1F1B of v·P small pieces, of which every P-th lies on the same device.

    Micro-batches go in groups of P: a device does a group with chunk 0, then with chunk 1, …
    Backwards take the chunks from the last one.
    """
    require(
        microbatches % stages == 0,
        f"interleaved with {stages} stages needs a multiple of {stages} micro-batches, "
        f"not {microbatches}",
    )
    visits = [
        (group + m, chunk)
        for group in range(0, microbatches, stages)
        for chunk in range(chunks)
        for m in range(stages)
    ]

    def order(rank: int) -> Order:
        forwards = tuple(forward(m, c) for m, c in visits)
        backwards = tuple(backward(m, chunks - 1 - c) for m, c in visits)
        return in_turn(forwards, backwards, 2 * (stages - 1 - rank) + (chunks - 1) * stages)

    orders = tuple(order(rank) for rank in range(stages))
    path = straight(stages, chunks)
    return PipelineSchedule("interleaved", stages, microbatches, (path,), orders)


def in_turn(forwards: Order, backwards: Order, ahead: int) -> Order:
    """`ahead` forwards, then a forward and a backward in turn, then what is left."""
    steps = list(forwards[:ahead])
    for number, step in enumerate(backwards):
        steps += forwards[ahead + number : ahead + number + 1]
        steps.append(step)
    return tuple(steps)
