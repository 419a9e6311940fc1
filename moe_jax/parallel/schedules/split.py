"""A schedule with whole backwards, turned into one whose backwards are in two parts."""

from dataclasses import replace

from moe_jax.parallel.schedules.operations import Kind, PipelineSchedule, Step


def split_backwards(schedule: PipelineSchedule) -> PipelineSchedule:
    """Each whole backward becomes Bi and then W, two steps. Overlapped pairs stay as they are.

    Where devices go from tick to tick together (an executor in one program), a whole backward makes
    every device wait for about two forwards. Its halves take about as long as a forward, and the
    gradient of the input is sent earlier: with P = 4 and M = 8, 1F1B takes 30 instead of 40 units.
    """
    orders = tuple(
        tuple(part for step in order for part in _parts(step)) for order in schedule.orders
    )
    return replace(schedule, orders=orders)


def _parts(step: Step) -> tuple[Step, ...]:
    first = step[0]
    if len(step) > 1 or first.kind != Kind.BACKWARD:
        return (step,)
    return (
        (first._replace(kind=Kind.BACKWARD_INPUT),),
        (first._replace(kind=Kind.BACKWARD_WEIGHT),),
    )
