"""The simulator against equations solved by brute force, and against what the papers publish."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.base.errors import UserError
from moe_jax.parallel.schedules import SCHEDULES, Kind, Place, build
from moe_jax.parallel.schedules.published import PUBLISHED, Costs
from moe_jax.parallel.schedules.split import split_backwards
from moe_jax.parallel.simulate import activations_of_steps, simulate
from tests.parallel.pipelines import items, schedules, sizes

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT
times = st.integers(1, 40).map(lambda n: n / 8)  # sums of eighths are exact


def cost(kind, costs):
    """An operation's cost. `costs` are F, Bi and W."""
    forward, to_input, to_weight = costs
    return {F: forward, B: to_input + to_weight, I: to_input, W: to_weight}[kind]


def waits_for(schedule):
    """Every operation -> the operations that it waits for, by the definition of backpropagation."""
    done = {
        (kind, microbatch, Place(device, chunk))
        for device, order in enumerate(schedule.orders)
        for step in order
        for kind, microbatch, chunk in step
    }
    edges = {}
    for microbatch, piece, here in items(schedule):
        path = schedule.path_of(microbatch)
        before = path[piece - 1] if piece else None
        after = path[piece + 1] if piece + 1 < len(path) else None
        wanted = {
            F: [(F, before)],
            B: [(F, here), (B, after), (I, after)],
            I: [(F, here), (B, after), (I, after)],
            W: [(I, here)],
        }
        for kind in Kind:
            if (kind, microbatch, here) in done:
                needs = [(other, microbatch, place) for other, place in wanted[kind]]
                edges[kind, microbatch, here] = [need for need in needs if need in done]
    return edges


def ends_by_relaxation(schedule, costs, delay):
    """The end of every operation: the equations are applied until nothing changes any more."""
    edges = waits_for(schedule)
    ends = dict.fromkeys(edges, 0.0)
    changed = True
    while changed:
        changed = False
        for device, order in enumerate(schedule.orders):
            free = 0.0
            for step in order:
                names = [(kind, m, Place(device, chunk)) for kind, m, chunk in step]
                arrivals = [
                    ends[need] + (delay if need[2].device != device else 0.0)
                    for name in names
                    for need in edges[name]
                ]
                end = max([free, *arrivals]) + sum(cost(name[0], costs) for name in names)
                changed |= any(ends[name] != end for name in names)
                ends.update(dict.fromkeys(names, end))
                free = end
    return ends


@settings(deadline=None, max_examples=30)
@given(schedules(), times, times, times, st.integers(0, 16).map(lambda n: n / 8))
def test_times_solve_the_equations(schedule, forward, to_input, to_weight, delay):
    size = schedule.piece_size
    found = simulate(
        schedule,
        forward=forward,
        backward_input=to_input,
        backward_weight=to_weight,
        communication=delay,
    )
    costs = (forward * size, to_input * size, to_weight * size)
    ends = ends_by_relaxation(schedule, costs, delay)
    for device, spans in enumerate(found.timeline):
        for step, start, end in spans:
            for kind, microbatch, chunk in step:
                assert end == pytest.approx(ends[kind, microbatch, Place(device, chunk)])
            assert end - start == pytest.approx(sum(cost(op.kind, costs) for op in step))
        assert all(a.end <= b.start for a, b in pairwise(spans))
    assert found.makespan == pytest.approx(max(ends.values()))


def activations_by_events(schedule, simulation):
    """The most activations of each device, counted from the times in which they are there."""
    most = []
    for spans in simulation.timeline:
        begins = {}
        lives = []
        for step, start, end in spans:
            for kind, microbatch, chunk in step:
                if kind == F:
                    begins[microbatch, chunk] = start
                elif kind in (B, W):
                    lives.append((begins[microbatch, chunk], end))
        counts = [sum(a <= time < b for a, b in lives) for time, _ in lives]
        most.append(max(counts) * schedule.piece_size)
    return tuple(most)


@settings(deadline=None, max_examples=30)
@given(schedules(), times, times)
def test_peak_is_what_is_alive(schedule, forward, to_weight):
    found = simulate(schedule, forward=forward, backward_weight=to_weight)
    assert found.peak_activations == activations_by_events(schedule, found)


# What each paper says, for the costs for which it says it. schedules/published.py has the sources.
@st.composite
def published_cases(draw):
    """A schedule's name, size and costs, within what its closed form assumes."""
    name = draw(st.sampled_from(list(SCHEDULES)))
    P, M, v = draw(sizes(name))
    forward = draw(times)
    to_input = draw(times)
    to_weight = draw(times)
    overlapped = None
    if name in ("zb-h1", "zb-h2"):
        M = max(M, P)
        to_weight = min(forward, to_input, to_weight)
    if name == "zb-v":
        to_input = forward
        to_weight = forward
    if name.startswith("dualpipe"):
        to_input = forward
        to_weight = min(forward, to_weight)
        # From the longer of the two alone, to both one after the other.
        overlapped = to_input + to_weight + draw(st.integers(0, 8)) / 8 * forward
    return name, (P, M, v), (forward, to_input, to_weight, overlapped)


@settings(deadline=None, max_examples=150)
@given(published_cases())
def test_bubble_peak_and_weights_are_the_published_ones(case):
    name, (P, M, v), (forward, to_input, to_weight, overlapped) = case
    schedule = build(name, stages=P, microbatches=M, chunks=v)
    found = simulate(
        schedule,
        forward=forward,
        backward_input=to_input,
        backward_weight=to_weight,
        overlapped=overlapped,
    )
    pair = forward + to_input + to_weight if overlapped is None else overlapped
    paper = PUBLISHED[name]
    costs = Costs(forward, to_input, to_weight, pair)
    assert paper.exact(P, M, costs)
    assert found.bubble == pytest.approx(paper.bubble(P, v, costs), abs=1e-9)
    assert max(found.peak_activations) == pytest.approx(paper.peak(P, M, v))
    assert schedule.weights == paper.weights
    assert schedule.messages == paper.messages(P, M, v)


# (name, P, M, v) -> bubble with F = Bi = W = 1, peak, stages on a device. Numbers, so that a wrong
# formula in schedules/published.py is seen, too. P(1+(P-1)/(Pv)) = 5.5 for P = 4, v = 2.
TABLE = [
    ("gpipe", (4, 8, 1), 9, 8, 1),
    ("1f1b", (4, 8, 1), 9, 4, 1),
    ("1f1b", (8, 16, 1), 21, 8, 1),
    ("interleaved", (4, 8, 2), 4.5, 5.5, 1),
    ("interleaved", (8, 16, 4), 5.25, 9.75, 1),
    ("zb-h1", (4, 8, 1), 3, 4, 1),
    ("zb-h1", (8, 16, 1), 7, 8, 1),
    ("zb-h2", (4, 8, 1), 0, 7, 1),
    ("zb-v", (4, 8, 1), 0, 4, 1),
    ("zb-v", (8, 24, 1), 0, 8, 1),
    ("dualpipe", (4, 8, 1), 2, 5, 2),
    ("dualpipe", (8, 20, 1), 6, 9, 2),
    ("dualpipe", (16, 32, 1), 14, 17, 2),
    ("dualpipev", (8, 20, 1), 6, 9, 2),
]


@pytest.mark.parametrize(("name", "size", "bubble", "peak", "weights"), TABLE)
def test_published_numbers(name, size, bubble, peak, weights):
    P, M, v = size
    schedule = build(name, stages=P, microbatches=M, chunks=v)
    found = simulate(schedule)
    assert found.bubble == pytest.approx(bubble)
    assert max(found.peak_activations) == pytest.approx(peak)
    assert schedule.weights == weights


def test_a_published_profile_of_interleaving():
    """Primus: with P = M = 16, a bubble of 48.4% of the makespan, and of 13.5% with v = 6."""
    plain = simulate(build("1f1b", stages=16, microbatches=16))
    six = simulate(build("interleaved", stages=16, microbatches=16, chunks=6))
    assert 1 - plain.efficiency == pytest.approx(0.484, abs=0.0005)
    assert 1 - six.efficiency == pytest.approx(0.135, abs=0.0005)


def test_zb_h2_is_a_parallelogram():
    """Its devices end as late as they begin. So the makespan has idle time, the period has none."""
    found = simulate(build("zb-h2", stages=4, microbatches=8))
    starts = [spans[0].start for spans in found.timeline]
    ends = [spans[-1].end for spans in found.timeline]
    assert starts == [0, 1, 2, 3]
    assert ends == [24, 25, 26, 27]
    assert (found.period, found.makespan) == (24, 27)
    assert (found.bubble, found.bubble_of_makespan) == (0, 3)


@settings(deadline=None, max_examples=40)
@given(schedules(), times, times)
def test_no_schedule_beats_its_work(schedule, forward, to_weight):
    found = simulate(schedule, forward=forward, backward_weight=to_weight, communication=0.5)
    work = schedule.microbatches * (forward + 1.0 + to_weight) * schedule.stages / schedule.devices
    assert max(found.busy) == pytest.approx(work)
    assert found.makespan >= found.period - 1e-9
    assert found.period >= work - 1e-9
    assert 0 < found.efficiency <= 1 + 1e-9


@settings(deadline=None, max_examples=30)
@given(schedules(), st.data())
def test_slower_is_never_earlier(schedule, data):
    """Orders are fixed, so no step ends earlier when a cost or the communication grows."""
    base = [data.draw(times) for _ in range(schedule.pieces)]
    more = [one + data.draw(st.sampled_from([0.0, 0.5])) for one in base]
    fast = simulate(schedule, forward=base, communication=0.25)
    slow = simulate(schedule, forward=more, communication=0.5)
    for quick, late in zip(fast.timeline, slow.timeline, strict=True):
        assert all(a.end <= b.end + 1e-9 for a, b in zip(quick, late, strict=True))


def test_a_slow_stage_makes_the_others_wait():
    """1F1B with a last stage that takes twice as long: the period is its work and the fill."""
    schedule = build("1f1b", stages=4, microbatches=8)
    costs = [1.0, 1.0, 1.0, 2.0]
    found = simulate(schedule, forward=costs, backward_input=costs, backward_weight=costs)
    assert found.busy == (24, 24, 24, 48)
    # Three stages of 1 before the first forward of the last, and of 2 after its last backward.
    assert found.makespan == 3 + 48 + 6
    assert found.bubble == 57 - 24


def test_costs_of_pieces_are_their_own():
    """One number is a stage's, a sequence has a piece's: halves of 0.5 are a stage of 1."""
    schedule = build("zb-v", stages=4, microbatches=8)
    one = simulate(schedule, forward=1.0)
    assert simulate(schedule, forward=[0.5] * 8) == one


def test_overlapped_pairs_take_their_own_time():
    schedule = build("dualpipe", stages=4, microbatches=8)
    plain = simulate(schedule)
    assert simulate(schedule, overlapped=3.0) == plain
    faster = simulate(schedule, overlapped=2.0)
    pairs = [sum(len(step) > 1 for step in order) for order in schedule.orders]
    saved = [a - b for a, b in zip(plain.busy, faster.busy, strict=True)]
    assert saved == pairs
    # A pair of pieces that cost more than the mean takes more than 2.0.
    costs = [0.5, 1.5, 0.5, 1.5]
    uneven = simulate(
        schedule, forward=costs, backward_input=costs, backward_weight=costs, overlapped=2.0
    )
    pair = next(span for span in uneven.timeline[0] if len(span.step) > 1)
    # Device 0 has stages 0 and 3: a forward of one and a backward of the other.
    forward, backward = pair.step
    work = 0.5 + 2 * 1.5 if forward.chunk == 0 else 1.5 + 2 * 0.5
    assert pair.end - pair.start == pytest.approx(work * 2 / 3)
    assert {forward.chunk, backward.chunk} == {0, 1}


def test_lockstep_waits_for_the_slowest_of_each_tick():
    """P = 4 and M = 8: 1F1B's whole backwards make everybody wait, split ones do not."""
    whole = build("1f1b", stages=4, microbatches=8)
    assert simulate(whole).makespan == 33
    assert simulate(whole, lockstep=True).makespan == 40
    # The counts of ticks of a table with F, Bi and W: 30, 30 and 27.
    for name, ticks in (("gpipe", 30), ("1f1b", 30), ("zb-h1", 27)):
        split = split_backwards(build(name, stages=4, microbatches=8))
        assert simulate(split, lockstep=True).makespan == ticks
        assert simulate(split).makespan == ticks


@settings(deadline=None, max_examples=30)
@given(schedules(), times, times)
def test_lockstep_is_never_faster(schedule, forward, communication):
    free = simulate(schedule, forward=forward, communication=communication)
    coupled = simulate(schedule, forward=forward, communication=communication, lockstep=True)
    assert coupled.makespan >= free.makespan - 1e-9
    assert coupled.busy == free.busy


def test_lockstep_communicates_once_a_tick():
    schedule = build("zb-h1", stages=4, microbatches=8)
    found = simulate(schedule, lockstep=True, communication=0.5)
    # 27 ticks, and what is sent in the last one belongs to no step of this update.
    assert found.makespan == 27 + 26 * 0.5


ERRORS = [
    ({"forward": -1.0}, "forward has a cost of -1.0"),
    ({"backward_weight": [1.0, 1.0]}, "has 2 costs: 1f1b has 4 pieces"),
    ({"communication": -0.5}, "communication is -0.5"),
    ({"overlapped": -1.0}, "overlapped is -1.0"),
    ({"forward": 0, "backward_input": 0, "backward_weight": 0}, "all costs are 0"),
    ({"forward": math.nan}, "forward has a cost of nan"),
    ({"forward": math.inf}, "forward has a cost of inf"),
    ({"forward": [1.0, math.nan, 1.0, 1.0]}, "forward has a cost of nan"),
    ({"communication": math.nan}, "communication is nan"),
]


@pytest.mark.parametrize(("costs", "words"), ERRORS)
def test_impossible_costs_are_one_line(costs, words):
    with pytest.raises(UserError, match=words):
        simulate(build("1f1b", stages=4, microbatches=4), **costs)


def test_what_a_device_holds_in_each_step():
    """One stage of ZB-H1: F, Bi and W in turn. A whole backward leaves nothing for W."""
    assert activations_of_steps(build("zb-h1", 1, 2)) == (
        ((1, 0), (1, 1), (1, 1), (1, 0), (1, 1), (1, 1)),
    )
    for kept, pending in activations_of_steps(build("1f1b", 4, 8))[0]:
        assert 0 < kept <= 4
        assert pending == 0
