"""All schedules do every operation once and in order, and a bad table is one clear line."""

import itertools
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings

from moe_jax.base.errors import UserError
from moe_jax.parallel.schedules import SCHEDULES, Kind, Operation, PipelineSchedule, Place, build
from moe_jax.parallel.schedules.operations import backward, folded, forward, straight
from moe_jax.parallel.schedules.split import split_backwards
from tests.parallel.pipelines import items, operations, schedules

F, B, I, W = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT


def short(schedule, device):
    """A device's order as the papers write it: `F0`, `f1` for chunk 1, `F2&b0` for a pair."""
    letters = {F: "Ff", B: "Bb", I: "Ii", W: "Ww"}
    return " ".join(
        "&".join(f"{letters[kind][chunk]}{microbatch}" for kind, microbatch, chunk in step)
        for step in schedule.orders[device]
    )


@settings(deadline=None, max_examples=80)
@given(schedules())
def test_every_operation_is_done_once_and_after_its_forward(schedule):
    # It does not use the checks of the schedule itself.
    done = Counter()
    when = {}
    for device, number, (kind, microbatch, chunk) in operations(schedule):
        place = Place(device, chunk)
        done[kind, microbatch, place] += 1
        when[kind, microbatch, place] = number
    for microbatch, _, place in items(schedule):
        times = {kind: done.pop((kind, microbatch, place), 0) for kind in Kind}
        assert times in ({F: 1, B: 1, I: 0, W: 0}, {F: 1, B: 0, I: 1, W: 1})
        order = [when[kind, microbatch, place] for kind in Kind if times[kind]]
        assert order == sorted(order)
    assert not done


@settings(deadline=None, max_examples=40)
@given(schedules())
def test_paths_go_to_neighbours_and_pieces_fill_the_model(schedule):
    for path in schedule.paths:
        for here, there in itertools.pairwise(path):
            distance = (there.device - here.device) % schedule.devices
            # Next door, around the ring, or on the same device.
            assert distance in (0, 1, schedule.devices - 1)
    assert schedule.pieces * schedule.piece_size == pytest.approx(schedule.stages)
    sent = sum(
        2
        for microbatch, piece, place in items(schedule)
        if piece and schedule.path_of(microbatch)[piece - 1].device != place.device
    )
    assert schedule.messages == sent


def test_orders_as_the_papers_draw_them():
    """Devices of small pipelines, written by hand from the papers' figures."""
    one = build("1f1b", stages=4, microbatches=5)
    assert short(one, 2) == "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4"
    assert short(one, 3) == "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4"
    h1 = build("zb-h1", stages=3, microbatches=4)
    assert short(h1, 0) == "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3"
    assert short(h1, 2) == "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"
    h2 = build("zb-h2", stages=2, microbatches=4)
    assert short(h2, 0) == "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3"
    assert short(h2, 1) == "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3"
    inter = build("interleaved", stages=2, microbatches=4, chunks=2)
    assert short(inter, 1) == "F0 F1 f0 b0 f1 b1 F2 B0 F3 B1 f2 b2 f3 b3 B2 B3"


def test_dualpipe_follows_its_eight_steps():
    dual = build("dualpipe", stages=4, microbatches=8)
    steps = ["F0 F1", "F2 f4", "i4 w4 f5", "F3&b5 f6&B0", "b6 f7&B1", "b7 I2", "W2 I3", "W3"]
    assert short(dual, 0) == " ".join(steps)
    # The middle: no steps 1, 3, 5 and 7, and its first pair is not overlapped.
    middle = ["F0 f4 F1 f5", "F2 b4 f6&B0 F3&b5 f7&B1", "b6 B2 i7 I3", "w7 W3"]
    assert short(dual, 1) == " ".join(middle)
    # The other half is its mirror image: the micro-batches of the other path, the other chunk.
    mirror = {"F": "f", "f": "F", "B": "b", "b": "B", "I": "i", "i": "I", "W": "w", "w": "W"}
    mirror |= {str(m): str((m + 4) % 8) for m in range(8)}
    for device in (0, 1):
        mirrored = "".join(mirror.get(letter, letter) for letter in short(dual, device))
        assert short(dual, 3 - device) == mirrored


def test_dualpipev_is_half_of_dualpipe():
    """With the same number of micro-batches a direction, its device r does what DualPipe's does."""
    dual = build("dualpipe", stages=6, microbatches=12)
    half = build("dualpipev", stages=6, microbatches=6)
    assert half.devices == 3
    for device in range(3):
        kinds = [[(op.kind, op.chunk) for op in step] for step in half.orders[device]]
        assert kinds == [[(op.kind, op.chunk) for op in step] for step in dual.orders[device]]


def test_split_backwards_keep_their_place():
    whole = build("1f1b", stages=2, microbatches=3)
    assert short(split_backwards(whole), 1) == "F0 I0 W0 F1 I1 W1 F2 I2 W2"
    dual = build("dualpipe", stages=4, microbatches=8)
    assert "F3&b5" in short(split_backwards(dual), 0)


ERRORS = [
    ({"name": "1f1", "stages": 4, "microbatches": 8}, "did you mean 1f1b"),
    ({"name": "1f1b", "stages": 0, "microbatches": 8}, "stages is 0"),
    ({"name": "1f1b", "stages": 4, "microbatches": 0}, "microbatches is 0"),
    ({"name": "interleaved", "stages": 4, "microbatches": 8, "chunks": 0}, "chunks is 0"),
    ({"name": "gpipe", "stages": 4, "microbatches": 8, "chunks": 2}, "one chunk a stage"),
    ({"name": "zb-h1", "stages": 4, "microbatches": 8, "chunks": 2}, "one chunk a stage"),
    ({"name": "zb-v", "stages": 4, "microbatches": 8, "chunks": 3}, "two chunks a device"),
    ({"name": "interleaved", "stages": 4, "microbatches": 6, "chunks": 2}, "multiple of 4"),
    ({"name": "zb-h2", "stages": 4, "microbatches": 6}, "at least 7 micro-batches, not 6"),
    ({"name": "zb-v", "stages": 4, "microbatches": 6}, "at least 7 micro-batches, not 6"),
    ({"name": "dualpipe", "stages": 4, "microbatches": 6}, "at least 8 micro-batches, not 6"),
    ({"name": "dualpipe", "stages": 3, "microbatches": 8}, "even number of stages, not 3"),
    ({"name": "dualpipe", "stages": 4, "microbatches": 9}, "even number of micro-batches, not 9"),
    ({"name": "dualpipev", "stages": 5, "microbatches": 8}, "even number of stages, not 5"),
    ({"name": "dualpipev", "stages": 4, "microbatches": 3}, "at least 4 micro-batches, not 3"),
]


@pytest.mark.parametrize(("arguments", "words"), ERRORS)
def test_impossible_numbers_are_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as error:
        build(**arguments)
    assert "\n" not in str(error.value)


def test_layers_that_do_not_divide_are_refused():
    assert build("interleaved", stages=4, microbatches=4, chunks=2).layers_of_piece(16) == 2
    with pytest.raises(UserError, match="choose a multiple of 8"):
        build("zb-v", stages=4, microbatches=8).layers_of_piece(12)
    with pytest.raises(UserError, match="0 layers"):
        build("gpipe", stages=1, microbatches=1).layers_of_piece(0)


GOOD = build("zb-h1", stages=2, microbatches=2)


def with_order(device, change):
    """GOOD with one device's order changed."""
    orders = list(GOOD.orders)
    orders[device] = tuple(change(list(orders[device])))
    return replace(GOOD, orders=tuple(orders))


BAD = [
    (lambda: with_order(0, lambda o: o[1:]), "never does the forward of micro-batch 0"),
    (lambda: with_order(1, lambda o: o[:-1]), "never does a backward of micro-batch 1"),
    (lambda: with_order(0, lambda o: [*o, o[0]]), "forward of micro-batch 0, chunk 0 2 times"),
    (lambda: with_order(0, lambda o: [*o, backward(0)]), "backward of .* whole and in parts"),
    (lambda: with_order(0, lambda o: o[::-1]), "in a wrong order"),
    (lambda: with_order(0, lambda o: [*o, forward(0, 1)]), "1 operations on chunks where"),
    (lambda: with_order(0, lambda o: [*o, forward(7)]), "1 operations on chunks where"),
    (lambda: with_order(0, lambda o: [o[0] + o[1], *o[2:]]), "at once"),
    (lambda: with_order(0, lambda o: [*o, ()]), "does nothing at once"),
    (lambda: replace(GOOD, paths=(straight(1),)), "do not fill 2 devices"),
    (lambda: replace(GOOD, paths=(straight(2)[:1] * 2,)), "have one place"),
    (lambda: replace(GOOD, paths=()), "there is no path"),
    (lambda: replace(GOOD, paths=(straight(2), straight(1))), "differ in length"),
    (lambda: replace(GOOD, paths=(straight(2),) * 3), "do not divide into 3 paths"),
    (lambda: replace(GOOD, microbatches=0), "0 micro-batches"),
    (lambda: replace(GOOD, stages=0), "0 stages"),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_bad_tables_are_one_line(make, words):
    with pytest.raises(UserError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("zb-h1: ")


def test_a_deadlock_names_who_waits():
    # Each device waits for what the other one does last: the second begins with micro-batch 1.
    orders = (
        (forward(0), backward(0), forward(1), backward(1)),
        (forward(1), backward(1), forward(0), backward(0)),
    )
    with pytest.raises(UserError, match=r"deadlock, device 0 waits .* backward of micro-batch 0"):
        PipelineSchedule("own", 2, 2, (straight(2),), orders)


def test_a_pair_of_one_micro_batch_cannot_run():
    pair = ((Operation(F, 0, 0), Operation(B, 0, 0)),)
    with pytest.raises(UserError, match="own: "):
        PipelineSchedule("own", 1, 1, (straight(1),), (pair,))


def test_an_own_schedule_is_a_function_and_a_name():
    """What the documents promise: nothing else must be changed to add one."""
    path = folded(1)
    order = (forward(0, 0), forward(0, 1), backward(0, 1), backward(0, 0))
    own = PipelineSchedule("own", 1, 1, (path,), (order,))
    assert own.pieces == 2
    assert own.messages == 0


def test_no_jax_is_imported():
    code = (
        "import sys; from moe_jax.parallel import simulate, ticks; "
        "from moe_jax.parallel.schedules import build, published, split; "
        "build('zb-v', stages=2, microbatches=4); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_eight_are_there():
    names = ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe", "dualpipev"]
    assert list(SCHEDULES) == names
    for name in names:
        assert build(name, stages=2, microbatches=4).name == name
