"""Pipeline schedules for the tests: all eight, of any size that each can have."""

from hypothesis import strategies as st

from moe_jax.parallel.schedules import SCHEDULES, build
from moe_jax.parallel.schedules.operations import PipelineSchedule


@st.composite
def sizes(draw, name):
    """(P, M, v) that the schedule `name` can have."""
    if name.startswith("dualpipe"):
        P = 2 * draw(st.integers(1, 4))
        if name == "dualpipev":
            return P, draw(st.integers(P, 3 * P)), 1
        return P, 2 * draw(st.integers(P, 2 * P)), 1
    P = draw(st.integers(1, 6))
    if name == "interleaved":
        return P, P * draw(st.integers(1, 4)), draw(st.integers(1, 4))
    least = 2 * P - 1 if name in ("zb-h2", "zb-v") else 1
    return P, draw(st.integers(least, 3 * P + 2)), 1


@st.composite
def schedules(draw, names=tuple(SCHEDULES)):
    """A schedule of some size."""
    name = draw(st.sampled_from(names))
    P, M, v = draw(sizes(name))
    return build(name, stages=P, microbatches=M, chunks=v)


def operations(schedule: PipelineSchedule):
    """(device, number of the step, operation) of everything."""
    for device, order in enumerate(schedule.orders):
        for number, step in enumerate(order):
            for operation in step:
                yield device, number, operation


def items(schedule: PipelineSchedule):
    """(micro-batch, number of the piece, place) of all that must be trained."""
    for microbatch in range(schedule.microbatches):
        for piece, place in enumerate(schedule.path_of(microbatch)):
            yield microbatch, piece, place
