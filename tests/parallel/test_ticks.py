"""The table of ticks, run by a machine that knows nothing but the table."""

import numpy as np
import pytest
from hypothesis import given, settings

from moe_jax.parallel.schedules import Kind, Place, build
from moe_jax.parallel.schedules.split import split_backwards
from moe_jax.parallel.simulate import peak_activations, simulate
from moe_jax.parallel.ticks import IDLE, NONE, OVERLAPPED, tick_table
from tests.parallel.pipelines import items, schedules


class Machine:
    """Devices with slots. Contents are names of what an executor would have there.

    A slot that was never written holds None. One that is written too early loses what was in it, so
    any collision of slots hands a wrong name to somebody.
    """

    def __init__(self, schedule):
        self.schedule = schedule
        self.table = tick_table(schedule)
        slots = self.table.slots
        sizes = {
            "activation": slots.activation,
            "gradient": slots.gradient,
            "saved": slots.saved,
            "pending": slots.pending,
        }
        self.memory = {
            name: [[None] * size for _ in range(schedule.devices)] for name, size in sizes.items()
        }
        self.weights = []

    def take(self, name, device, slot):
        assert 0 <= slot < len(self.memory[name][device])
        return self.memory[name][device][slot]

    def put(self, name, device, slot, value):
        assert 0 <= slot < len(self.memory[name][device])
        self.memory[name][device][slot] = value

    def item(self, part, tick, device):
        """(micro-batch, piece) of a device's work."""
        place = Place(device, int(part.chunk[tick, device]))
        return int(part.microbatch[tick, device]), self.schedule.positions[place]

    def forward(self, tick, device):
        part = self.table.forward
        microbatch, piece = self.item(part, tick, device)
        slot = part.inbox[tick, device]
        if piece == 0:
            assert slot == NONE
        else:
            assert self.take("activation", device, slot) == ("activation", microbatch, piece)
        self.put("saved", device, part.saved[tick, device], ("saved", microbatch, piece))
        return ("activation", microbatch, piece + 1)

    def backward(self, tick, device, kind):
        part = self.table.backward
        microbatch, piece = self.item(part, tick, device)
        saved = self.take("saved", device, part.saved[tick, device])
        assert saved == ("saved", microbatch, piece)
        pending = part.pending[tick, device]
        if kind == Kind.BACKWARD_WEIGHT:
            assert self.take("pending", device, pending) == ("pending", microbatch, piece)
            assert part.inbox[tick, device] == NONE
        else:
            slot = part.inbox[tick, device]
            if piece == self.schedule.pieces - 1:
                assert slot == NONE
            else:
                assert self.take("gradient", device, slot) == ("gradient", microbatch, piece)
        if kind == Kind.BACKWARD_INPUT:
            self.put("pending", device, pending, ("pending", microbatch, piece))
        else:
            self.weights.append((microbatch, piece))
        return None if kind == Kind.BACKWARD_WEIGHT else ("gradient", microbatch, piece - 1)

    def work(self, tick, device):
        """One device's step. Returns what it has for others: {payload: message}."""
        kind = self.table.kinds[tick, device]
        out = {}
        # The backward reads its slots before the forward of a pair writes, and after: both must do.
        if kind == OVERLAPPED:
            before = [list(slots) for slots in self.memory["saved"]]
            self.backward(tick, device, Kind.BACKWARD)
            self.weights.pop()
            self.memory["saved"] = before
        if kind in (Kind.FORWARD, OVERLAPPED):
            out["activation"] = self.forward(tick, device)
        else:
            assert self.table.forward.microbatch[tick, device] == NONE
        if kind not in (IDLE, Kind.FORWARD):
            whole = Kind.BACKWARD if kind == OVERLAPPED else kind
            out["gradient"] = self.backward(tick, device, whole)
        else:
            assert self.table.backward.microbatch[tick, device] == NONE
        return out

    def exchange(self, tick, outputs):
        """All messages of a tick. Every one that is sent is stored, and nothing else is."""
        devices = self.schedule.devices
        sent = set()
        for channel in self.table.channels:
            for sender in range(devices):
                receiver = (sender + channel.hop) % devices
                slot = channel.slots[tick, receiver]
                assert (slot != NONE) == channel.sends[tick, sender]
                if channel.sends[tick, sender]:
                    message = outputs[sender][channel.payload]
                    self.put(channel.payload, receiver, slot, message)
                    assert (sender, message) not in sent
                    sent.add((sender, message))
        for sender, out in enumerate(outputs):
            for payload, message in out.items():
                ends = {"activation": self.schedule.pieces, "gradient": -1}
                inside = message is not None and message[2] != ends[payload]
                assert ((sender, message) in sent) == inside

    def run(self):
        for tick in range(len(self.table.kinds)):
            outputs = [self.work(tick, device) for device in range(self.schedule.devices)]
            self.exchange(tick, outputs)
        return self.weights


@settings(deadline=None, max_examples=60)
@given(schedules())
def test_the_table_alone_trains_every_micro_batch_once(schedule):
    weights = Machine(schedule).run()
    assert sorted(weights) == sorted((m, piece) for m, piece, _ in items(schedule))


@settings(deadline=None, max_examples=30)
@given(schedules())
def test_tables_of_split_backwards_run(schedule):
    split = split_backwards(schedule)
    assert len(Machine(split).run()) == schedule.microbatches * schedule.pieces


@settings(deadline=None, max_examples=40)
@given(schedules())
def test_saved_slots_are_the_peak_of_the_activations(schedule):
    """As many slots as the fullest device needs, and not one more."""
    saved = tick_table(schedule).slots.saved
    assert saved * schedule.piece_size == pytest.approx(max(peak_activations(schedule)))


@settings(deadline=None, max_examples=30)
@given(schedules())
def test_ticks_are_the_times_of_a_simulation(schedule):
    table = tick_table(schedule)
    steps = sum(len(order) for order in schedule.orders)
    assert (table.kinds != IDLE).sum() == steps
    split = split_backwards(schedule)
    if not any(len(step) > 1 for order in split.orders for step in order):
        size = split.piece_size
        assert len(tick_table(split).kinds) == round(simulate(split).makespan / size)


def test_memory_for_messages_does_not_grow_with_micro_batches():
    for name in ("1f1b", "zb-h1", "zb-h2", "zb-v", "dualpipe", "dualpipev"):
        few = tick_table(build(name, stages=4, microbatches=16)).slots
        many = tick_table(build(name, stages=4, microbatches=48)).slots
        assert few == many, name


CHANNELS = {
    "1f1b": [("activation", 1), ("gradient", 3)],
    # Around the ring, always in one direction.
    "interleaved": [("activation", 1), ("gradient", 3)],
    # Both directions, and the fold at the last device.
    "zb-v": [(payload, hop) for payload in ("activation", "gradient") for hop in (0, 1, 3)],
    "dualpipe": [(payload, hop) for payload in ("activation", "gradient") for hop in (1, 3)],
}


@pytest.mark.parametrize("name", CHANNELS)
def test_channels(name):
    chunks = 2 if name == "interleaved" else 1
    table = tick_table(build(name, stages=4, microbatches=8, chunks=chunks))
    assert [(channel.payload, channel.hop) for channel in table.channels] == CHANNELS[name]
    around = [channel.sends[:, -1].any() for channel in table.channels if channel.hop == 1]
    assert around == ([True] if name == "interleaved" else [False] * len(around))


def test_one_stage_sends_nothing():
    table = tick_table(build("1f1b", stages=1, microbatches=3))
    assert table.channels == ()
    assert table.kinds.T.tolist() == [[Kind.FORWARD, Kind.BACKWARD] * 3]
    assert table.slots.activation == table.slots.gradient == 0


def test_a_small_table_by_hand():
    table = tick_table(build("1f1b", stages=2, microbatches=2))
    f, b = Kind.FORWARD, Kind.BACKWARD
    assert table.kinds.T.tolist() == [[f, f, IDLE, b, IDLE, b], [IDLE, f, b, f, b, IDLE]]
    assert table.forward.microbatch.T.tolist() == [
        [0, 1, NONE, NONE, NONE, NONE],
        [NONE, 0, NONE, 1, NONE, NONE],
    ]
    down = table.channels[0]
    assert np.argwhere(down.sends).tolist() == [[0, 0], [1, 0]]
    # The second message waits in the slot while the device does the backward of the first.
    assert down.slots[:2, 1].tolist() == [0, 0]
