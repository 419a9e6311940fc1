"""Processes that talk to each other, here as threads of one: values, one stop for all, losses."""

import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from moe_jax.base.errors import UserError
from moe_jax.base.signals import Stopped
from moe_jax.parallel.processes import ALONE, LOST_CODE, peers
from moe_jax.parallel.processes.hub import Hub
from moe_jax.parallel.processes.peers import FAREWELL, Group
from moe_jax.parallel.processes.start import join_group, require_same
from moe_jax.parallel.processes.tunnel import open_tunnel
from moe_jax.parallel.processes.wire import LostError, Wire, connect, listen

TIMEOUT = 1.0
WAIT = 20.0


class Joined:
    """Process 0 and others. What would end a process is noted in `ends` instead."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch):
        self.ends: dict[int, tuple[str, int]] = {}
        self.ended = threading.Condition()

        def end(group: Group, line: str, code: int) -> None:
            with self.ended:
                if not group.leaving:
                    group.leaving = True
                    self.ends[group.index] = (line, code)
                    self.ended.notify_all()

        monkeypatch.setattr(Group, "end", end)
        monkeypatch.setattr(peers, "BLAME_SECONDS", 0.0)
        server = listen(0)
        self.hub = Hub(server, count, TIMEOUT)
        self.address = f"localhost:{server.getsockname()[1]}"
        self.wires = [self.wire() for _ in range(1, count)]
        groups = [
            join_group(wire, index, count, TIMEOUT) for index, wire in enumerate(self.wires, 1)
        ]
        self.groups = [self.hub.group, *groups]
        self.hub.wait_for_all(WAIT)

    def wire(self) -> Wire:
        return Wire(connect(self.address, WAIT), TIMEOUT)

    def each(self, function, groups=None):
        """function(group) in every process at the same time. Their results in order."""
        groups = groups or self.groups
        with ThreadPoolExecutor(len(groups)) as pool:
            return list(pool.map(function, groups))

    def wait_for_ends(self, count: int) -> dict[int, tuple[str, int]]:
        with self.ended:
            assert self.ended.wait_for(lambda: len(self.ends) >= count, WAIT), self.ends
        return self.ends


@pytest.fixture
def joined(monkeypatch):
    opened = []

    def join(count: int) -> Joined:
        opened.append(Joined(count, monkeypatch))
        return opened[-1]

    yield join
    for each in opened:
        for group in each.groups:
            group.leaving = True
        each.hub.close()
        for wire in each.wires:
            wire.close()


def test_a_process_alone_waits_for_nobody():
    assert ALONE.exchange("name", 3) == [3]
    assert ALONE.from_first("name", 4) == 4
    assert ALONE.stops(7, None) is None
    assert ALONE.stops(7, signal.SIGTERM) == signal.SIGTERM


def test_values_go_to_all_in_the_order_of_the_processes(joined):
    three = joined(3)
    for turn in range(3):  # the same name again
        found = three.each(lambda group, t=turn: group.exchange("value", [group.index, t]))
        assert found == [[[0, turn], [1, turn], [2, turn]]] * 3
    large = "é" * 300_000
    assert three.each(lambda group: group.from_first("text", large)) == [large] * 3


def test_the_first_process_goes_first(joined):
    three = joined(3)
    order = []

    def work(group):
        with group.first("work"):
            time.sleep(0.05 * (group.index == 0))
            order.append(group.index)

    three.each(work)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


@pytest.mark.parametrize("told", [0, 2])
def test_all_stop_after_the_same_update(joined, told):
    """Processes at different updates, one of which gets the signal; none makes a further one."""
    three = joined(3)
    stopped_at = {}

    def run(group):
        done = 0
        while True:
            number = signal.SIGTERM if group.index == told and done >= 5 else None
            agreed = group.stops(done, number)
            if agreed is not None:
                stopped_at[group.index] = (done, agreed)
                return
            time.sleep(0.002 * (1 + group.index))
            done += 1

    three.each(run)
    assert len(set(stopped_at.values())) == 1
    done, number = stopped_at[told]
    assert number == signal.SIGTERM
    assert done >= 5


def test_a_process_that_has_begun_its_last_update_is_not_waited_for(joined):
    """Its main thread is inside that update, which needs the others."""
    two = joined(2)
    for done in range(10):
        two.groups[0].stops(done, None)
    for done in range(4):
        two.groups[1].stops(done, None)
    done = 4
    while two.groups[1].stops(done, signal.SIGTERM) is None:
        done += 1
        time.sleep(0.01)
    assert done >= 10, "the update that process 0 has begun is made by all"
    assert two.groups[0].stops(done, None) == signal.SIGTERM


def test_a_process_that_is_gone_ends_the_others_with_its_number(joined):
    three = joined(3)
    three.groups[2].leaving = True  # it is gone
    three.wires[1].close()
    ends = three.wait_for_ends(2)
    for index in (0, 1):
        line, code = ends[index]
        assert line.startswith("error: process 2 is lost (its connection has ended)")
        assert "the same command continues from the last checkpoint" in line
        assert code == LOST_CODE


def test_the_loss_of_the_first_process_is_seen_by_all(joined):
    three = joined(3)
    three.groups[0].leaving = True
    three.hub.close()
    ends = three.wait_for_ends(2)
    assert {ends[i][0][:27] for i in (1, 2)} == {"error: process 0 is lost (i"}


def test_a_process_that_gives_no_sign_of_life_is_lost(monkeypatch, joined):
    one_of_three = joined(2)
    silent = one_of_three.wires[0]
    monkeypatch.setattr(silent, "send", lambda message: None)
    began = time.monotonic()
    line, code = one_of_three.wait_for_ends(1)[0]
    assert line.startswith("error: process 1 is lost (it gave no sign of life)")
    assert time.monotonic() - began < 3 * TIMEOUT
    assert code == LOST_CODE


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("no room"), "error: process 1 has ended: no room", 2),
        (Stopped(signal.SIGTERM), "process 1 was stopped by SIGTERM", 143),
        (KeyError("a"), "error: process 1 has ended: KeyError: 'a'", 1),
    ],
)
def test_an_error_of_one_ends_the_others_in_its_words(joined, error, line, code):
    three = joined(3)
    three.groups[1].leave(error)
    ends = three.wait_for_ends(2)
    assert ends == {0: (line, code), 2: (line, code)}


def test_an_error_of_the_first_ends_the_others(joined):
    two = joined(2)
    two.groups[0].leave(UserError("no room"))
    assert two.wait_for_ends(1) == {1: ("error: process 0 has ended: no room", 2)}


def test_an_error_that_another_processs_end_has_caused_is_not_told(joined, monkeypatch):
    """A collective breaks before the loss is known."""
    two = joined(2)
    monkeypatch.setattr(peers, "BLAME_SECONDS", 0.5)
    two.groups[1].leaving = True  # it is gone
    threading.Timer(0.1, two.wires[0].close).start()
    two.groups[0].leave(ValueError("Connection closed by peer"))
    assert "process 1 is lost" in two.wait_for_ends(1)[0][0]


def test_an_agreed_stop_ends_each_with_a_line_of_its_own(joined):
    two = joined(2)
    two.each(lambda group: _until_stopped(group))
    two.each(lambda group: group.leave(Stopped(signal.SIGTERM)))
    two.hub.close()
    time.sleep(0.1)
    assert two.ends == {}


def _until_stopped(group):
    done = 0
    while group.stops(done, signal.SIGTERM) is None:
        done += 1
        time.sleep(0.001)


def test_after_the_farewell_nobody_is_missed(joined):
    two = joined(2)
    two.each(lambda group: group.exchange(FAREWELL))
    two.wires[0].close()
    time.sleep(0.1)
    assert two.ends == {}


def test_different_commands_are_named_in_every_process(joined):
    two = joined(2)

    def same(group):
        with pytest.raises(UserError) as error:
            require_same(group, {"steps": 10 + group.index, "seed": 0})
        return str(error.value)

    (line,) = set(two.each(same))
    assert line.startswith("process 1 was started with steps=11, and process 0 with 10: give all")


def start_hub(count: int) -> tuple[Hub, str]:
    server = listen(0)
    return Hub(server, count, TIMEOUT), f"localhost:{server.getsockname()[1]}"


def test_processes_that_do_not_come_are_named():
    hub, _ = start_hub(4)
    with pytest.raises(UserError, match=r"of 4 processes these have not come in 0\.1 s: 1, 2, 3"):
        hub.wait_for_all(0.1)
    hub.close()


@pytest.mark.parametrize(
    ("hellos", "message"),
    [
        ([{"hello": 1, "count": 4}], "process 1 was started with --processes.count 4, and process"),
        ([{"hello": 1, "count": 3}] * 2, "two processes were started with --processes.index 1"),
        ([{"hello": 0, "count": 3}], "two processes were started with --processes.index 0"),
    ],
)
def test_processes_with_wrong_numbers_end_the_start(hellos, message):
    hub, address = start_hub(3)
    wires = []
    for hello in hellos:
        wires.append(Wire(connect(address, WAIT), TIMEOUT))
        wires[-1].send(hello)
        time.sleep(0.05)
    with pytest.raises(UserError, match=message):
        hub.wait_for_all(WAIT)
    answer = {}
    while "end" not in answer:
        answer = wires[-1].receive()
    assert message in answer["end"]
    hub.close()
    for wire in wires:
        wire.close()


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2[]", b"\0\0\0\2{}", b"\0"])
def test_strangers_disturb_nobody(joined, sent):
    server = listen(0)
    hub = Hub(server, 2, TIMEOUT)
    port = server.getsockname()[1]
    with socket.create_connection(("localhost", port)) as stranger:
        stranger.sendall(sent)
        wire = Wire(connect(f"localhost:{port}", WAIT), TIMEOUT)
        wire.send({"hello": 1, "count": 2})
        hub.wait_for_all(WAIT)
    hub.close()
    wire.close()


def test_nobody_at_the_coordinators_address():
    free = listen(0, "127.0.0.1")
    port = free.getsockname()[1]
    free.close()
    with pytest.raises(UserError, match=f"process 0 does not answer at 127.0.0.1:{port}"):
        connect(f"127.0.0.1:{port}", 0.0)


def test_a_tunnel_carries_bytes_and_hides_the_end():
    far = listen(0, "127.0.0.1")
    port = open_tunnel(f"127.0.0.1:{far.getsockname()[1]}", WAIT)
    near = socket.create_connection(("127.0.0.1", port))
    served, _ = far.accept()
    near.sendall(b"question")
    assert served.recv(100) == b"question"
    served.sendall(b"answer")
    assert near.recv(100) == b"answer"
    served.close()
    near.settimeout(0.2)
    with pytest.raises(TimeoutError):  # and not its end
        near.recv(1)
    near.close()
    far.close()


def test_a_wire_says_why_it_ended():
    server = listen(0, "127.0.0.1")
    here = socket.create_connection(server.getsockname())
    there = Wire(server.accept()[0], 0.1)
    with pytest.raises(LostError, match="it gave no sign of life"):
        there.receive()
    here.close()
    with pytest.raises(LostError, match="its connection has ended"):
        there.receive()
    server.close()
