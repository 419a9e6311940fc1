"""An update in a pipeline: by hand, and against the simulator's lockstep."""

import pytest

from moe_jax.parallel.schedules import SCHEDULES, Kind
from moe_jax.parallel.simulate import simulate
from moe_jax.parallel.ticks import IDLE
from moe_jax.predict.layouts.fsdp import UPDATE_TRAFFIC
from moe_jax.predict.layouts.pipelined import (
    Ticks,
    in_ticks,
    memory_of,
    message_seconds,
    pipelined,
    schedule_on,
    tick_parts,
)
from tests.predict.layouts.toy import BASE, work

MESSAGE = BASE + 2e6 / 1e9
"""2 MB."""
OPTIMIZER = UPDATE_TRAFFIC * 4 * 5e6 / 2 / 1e12
"""Of four blocks on two devices."""


def test_1f1b_by_hand():
    """Two stages of two blocks: F = 13 ms, B = 26 ms. The longest path is F and B of micro-batch 0
    on both devices, and then of micro-batch 2 on both: four messages."""
    found = pipelined(work(devices=2), 4, schedule_on("1f1b", 2, 3))
    assert found.seconds == pytest.approx(4 * 39e-3 + 4 * MESSAGE + OPTIMIZER)


def test_every_operation_costs_its_overhead():
    """F and a whole backward are two operations: M + 1 of each are on the longest path."""
    plain = pipelined(work(devices=2), 4, schedule_on("1f1b", 2, 3)).seconds
    slow = pipelined(work(devices=2), 4, schedule_on("1f1b", 2, 3), overhead=1e-3).seconds
    assert slow - plain == pytest.approx(4 * 2 * 1e-3)


def test_a_slow_link_sends_one_message_at_a_time():
    """2 s a message. Each device sends three of them."""
    slow = work(devices=2, inside=1e6)
    found = pipelined(slow, 4, schedule_on("gpipe", 2, 3))
    assert found.seconds >= 3 * message_seconds(slow)


def test_overlapped_pairs_hide_the_exchange():
    """DualPipe, an exchange as long as all products of F, Bi and W."""
    slow = work(devices=8, axis=2, tokens=1000, inside=4 * 2e6 / 19.5e-3)
    schedule = schedule_on("dualpipe", 4, 16)
    hidden = pipelined(slow, 8, schedule).seconds
    exposed = pipelined(slow, 8, schedule_on("1f1b", 4, 16)).seconds
    assert hidden < 0.7 * exposed


@pytest.mark.parametrize("name", SCHEDULES)
def test_lockstep_is_the_simulators(name: str):
    """The simulator leaves out what follows the last tick."""
    shared = work(devices=8, axis=2)
    schedule = schedule_on(name, 4, 12, 2 if name == "interleaved" else 1)
    way = in_ticks(shared, 16, schedule, 1e-3)
    between = way.ticks.channels * message_seconds(shared) + 1e-3
    stage = 16 / way.schedule.stages
    parts = (shared.forward, shared.backward_input, shared.backward_weight)
    costs = [stage * part.seconds(shared.parts) for part in parts]
    expected = (
        simulate(way.schedule, *costs, communication=between, lockstep=True).makespan + between
    )
    tick = tick_parts(shared, 16, way, 1e-3)
    assert sum(tick) * way.ticks.number == pytest.approx(expected)
    assert tick.work == pytest.approx(12 * 4 * sum(costs) / stage / way.ticks.number)
    assert tick.waiting >= 0


def test_our_executor_sends_in_every_tick():
    """1F1B: activations one way, gradients the other way."""
    assert schedule_on("1f1b", 2, 2).ticks == Ticks(
        channels=2,
        kinds=(
            (frozenset({IDLE, Kind.FORWARD}), 1),
            (frozenset({Kind.FORWARD}), 1),
            (frozenset({IDLE, Kind.BACKWARD}), 3),
            (frozenset({Kind.FORWARD, Kind.BACKWARD}), 1),
        ),
    )


def test_memory_of_1f1b_and_dualpipe():
    """State 12 bytes on all devices, weights 2 and sums 4 bytes where they lie."""
    here = work(devices=4)
    one = memory_of(here, 8, schedule_on("1f1b", 4, 8))
    # Four stage-micro-batches of two blocks, and one block's gradients in a whole backward.
    assert one == 12 * 40e6 / 4 + 6 * 10e6 + 4 * 2 * 40e6 + 20e6
    both = memory_of(here, 8, schedule_on("dualpipe", 4, 8))
    assert both == pytest.approx(12 * 40e6 / 4 + 6 * 20e6 + 5 * 2 * 40e6 + 20e6, rel=0.1)


def test_a_split_backward_keeps_what_waits_for_w():
    """ZB-H1: the last of 4 devices has 4 micro-batches between Bi and W."""
    here = work(devices=4, recompute="full")
    found = memory_of(here, 8, schedule_on("zb-h1", 4, 8))
    assert found == 12 * 40e6 / 4 + 6 * 10e6 + 4 * 2 * (2e6 + 50e6)


def test_the_copies_of_dualpipe_add_their_gradients():
    """Two stages of 5 million parameters on each of two devices: sums 40 MB, weights 20 MB."""
    here = work(devices=2, inside=1e6)
    schedule = schedule_on("dualpipe", 2, 4)
    fast = pipelined(work(devices=2, inside=1e15), 2, schedule).seconds
    slow = pipelined(here, 2, schedule).seconds
    # Half of both goes to the other device. Messages of 2 MB take 2 s each.
    assert slow - fast == pytest.approx((20e6 + 10e6) / 1e6 + 2 * 2.0, rel=0.2)
