"""Process 0's side: it accepts the others, passes their values around, and sees who is gone."""

import contextlib
import socket
import threading
import time
from typing import Any

from moe_jax.base.errors import UserError, require
from moe_jax.parallel.processes.peers import FAREWELL, LOST_CODE, Group, describe_loss
from moe_jax.parallel.processes.wire import LostError, Message, Wire

BEATS = 5
"""Signs of life in the time after which a silent process counts as lost."""


class Hub:
    """All connections of process 0. Its own messages do not travel."""

    def __init__(self, server: socket.socket, count: int, timeout: float) -> None:
        self.group = Group(0, count, lambda message: self._take(0, message))
        self._server = server
        self._count = count
        self._timeout = timeout
        self._lock = threading.RLock()
        self._wires: dict[int, Wire] = {}
        self._arrived = threading.Condition(self._lock)
        self._fault: str | None = None
        self._values: dict[str, dict[int, Any]] = {}
        self._begun: dict[int, int] = {}
        self._number: int | None = None
        self._ended = False
        for target in (self._accept, self._beat):
            threading.Thread(target=target, daemon=True).start()

    def wait_for_all(self, patience: float) -> None:
        """Returns when every process has come. UserError: one has not, or is not of this run."""
        deadline = time.monotonic() + patience
        with self._arrived:
            while len(self._wires) < self._count - 1 and self._fault is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    absent = sorted(set(range(1, self._count)) - set(self._wires))
                    names = ", ".join(map(str, absent[:10])) + (", …" if len(absent) > 10 else "")
                    raise UserError(
                        f"of {self._count} processes these have not come in {patience:g} s: "
                        f"{names}: start them with the same command and their --processes.index"
                    )
                self._arrived.wait(left)
        require(self._fault is None, self._fault or "")

    def close(self) -> None:
        """Ends all connections."""
        self._ended = True
        self._server.close()
        for wire in self._wires.values():
            wire.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the server was closed
            while True:
                connection, _ = self._server.accept()
                wire = Wire(connection, self._timeout)
                threading.Thread(target=self._serve, args=(wire,), daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        """One connection, from its first message to its end."""
        try:
            hello = wire.receive()
        except LostError:
            wire.close()  # a stranger
            return
        index: Any = hello.get("hello")
        problem = self._problem(index, hello.get("count"))
        if problem is not None:
            with contextlib.suppress(LostError):
                wire.send({"end": f"error: {problem}", "code": 2})
            wire.close()
            return
        with self._arrived:
            self._wires[index] = wire
            self._arrived.notify_all()
        try:
            while True:
                self._take(index, wire.receive())
        except LostError as reason:
            if not self._ended:
                self._end_all(index, describe_loss(index, reason), LOST_CODE)

    def _problem(self, index: Any, count: Any) -> str | None:
        """Why a process cannot take part. Those that show a wrong command end the whole start."""
        with self._arrived:
            if type(index) is not int or type(count) is not int:
                return "this is no process of moe_jax"
            if len(self._wires) == self._count - 1:
                return f"the run has all of its {self._count} processes already"
            if count != self._count:
                self._fault = (
                    f"process {index} was started with --processes.count {count}, and process 0 "
                    f"with {self._count}: give all the same"
                )
            elif index in self._wires or not 0 < index < count:
                self._fault = (
                    f"two processes were started with --processes.index {index}: each has a number "
                    f"of its own, from 0 to {count - 1}"
                )
            self._arrived.notify_all()
            return self._fault

    def _beat(self) -> None:
        while not self._ended:
            self._send_all({"beat": 1})
            time.sleep(self._timeout / BEATS)

    def _take(self, index: int, message: Message) -> None:
        """Acts on a message of process `index`."""
        with self._lock:
            answer = self._answer(index, message)
        if answer is not None:
            self._send_all(answer)
            self.group.handle(answer)

    def _answer(self, index: int, message: Message) -> Message | None:
        if "put" in message:
            return self._put(index, message["put"], message["value"])
        if "stop" in message and self._number is None:
            self._number = message["stop"]
            return {"asked": self._number}
        if "begun" in message:
            self._begun[index] = message["begun"]
            if len(self._begun) == self._count:
                return {"stop_at": max(self._begun.values()), "number": self._number}
        if "bye" in message:
            who = f"process {index}"
            line = message["bye"]
            # `error: …` stays in front, as in every other line of this kind.
            words = line.removeprefix("error: ")
            line = f"error: {who} has ended: {words}" if words != line else f"{who} was {line}"
            self._end_all(index, line, message["code"])
        return None

    def _put(self, index: int, name: str, value: Any) -> Message | None:
        values = self._values.setdefault(name, {})
        values[index] = value
        if len(values) < self._count:
            return None
        del self._values[name]
        self._ended |= name == FAREWELL
        return {"all": name, "values": [values[i] for i in range(self._count)]}

    def _end_all(self, leaver: int, line: str, code: int) -> None:
        """Ends all processes but the one that left, this one last."""
        self._ended = True
        self._send_all({"end": line, "code": code}, leaver)
        if leaver != 0:
            self.group.end(line, code)

    def _send_all(self, message: Message, but: int | None = None) -> None:
        for index, wire in list(self._wires.items()):
            if index != but:
                with contextlib.suppress(LostError):  # its own thread notices it
                    wire.send(message)
