"""What the processes of a run tell each other: values, a wish to stop, and their end.

All processes are connected with process 0 (hub.py). JAX's own runtime sees a lost process after
minutes, and ends the others with pages of text. These connections see it at once, and say who.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from moe_jax.base.errors import UserError, brief
from moe_jax.base.process import named
from moe_jax.base.signals import stopped
from moe_jax.parallel.processes.wire import LostError, Message

LOST_CODE = 75
"""Exit code of a process that another one left alone (EX_TEMPFAIL): the command may be given
again."""
BLAME_SECONDS = 5.0
"""Time that an unexpected error has to turn out as another process's end."""
FAREWELL = "end"
"""The exchange after which connections may end."""


class Peers:
    """The other processes of a run. This class itself is for a process that trains alone."""

    index = 0
    count = 1
    leaving = False
    """Whether this process has told the others that it ends, or was told to."""

    def exchange(self, name: str, value: Any = None) -> list[Any]:
        """The values of all processes, in their order, once each has called this with `name`.

        Values are what JSON can express. Without one it is a barrier. Threads may call it, each
        with names of its own.
        """
        return [value]

    def from_first(self, name: str, value: Any = None) -> Any:
        """Process 0's value, in every process."""
        return self.exchange(name, value if self.index == 0 else None)[0]

    @contextmanager
    def first(self, name: str) -> Iterator[None]:
        """Process 0 runs the block first. The others run it when process 0 is through."""
        if self.index != 0:
            self.exchange(name)
        yield
        if self.index == 0:
            self.exchange(name)

    def stops(self, done: int, number: int | None) -> int | None:
        """Called before update `done` + 1: the signal at which all processes stop here, or None.

        `number`: the signal that has come to this process. All processes stop after the same
        update, whichever of them it came to.
        """
        return number

    def leave(self, error: BaseException) -> None:
        """Tells the others that this process ends with `error`. They end as well."""


ALONE = Peers()


class Group(Peers):
    """One of several processes. `handle` gets what process 0 sends."""

    def __init__(self, index: int, count: int, send: Callable[[Message], None]) -> None:
        """`send` takes a message to process 0. LostError: it cannot be sent."""
        self.index = index
        self.count = count
        self._send_to_first = send
        self._changed = threading.Condition()
        self._answers: dict[str, list[Any]] = {}
        self._begun = 0
        self._held = False
        self._stop: tuple[int, int] | None = None
        self._told = False
        self.leaving = False

    def exchange(self, name: str, value: Any = None) -> list[Any]:
        self._send({"put": name, "value": value})
        with self._changed:
            self._changed.wait_for(lambda: name in self._answers)
            return self._answers.pop(name)

    def stops(self, done: int, number: int | None) -> int | None:
        if number is not None and not self._told:
            self._told = True
            self._send({"stop": number})
        with self._changed:
            # The last step that any process has begun is not known yet. The answer comes at once:
            # no process needs its main thread for it.
            self._changed.wait_for(lambda: not self._held or self._stop is not None)
            if self._stop is None:
                self._begun = done + 1
                return None
            step, agreed = self._stop
            return agreed if done >= step else None

    def leave(self, error: BaseException) -> None:
        if isinstance(error, ValueError | RuntimeError | OSError):
            # Another process's end looks like an error of a collective, and is told of in a moment.
            time.sleep(BLAME_SECONDS)
        if isinstance(error, KeyboardInterrupt) and self._stop is not None:
            self.exchange(FAREWELL)  # all of them stop, each with a line of its own
        if not self.leaving:
            self.leaving = True
            line, code = describe_end(error)
            self._send({"bye": line, "code": code})

    def handle(self, message: Message) -> None:
        """Acts on a message of process 0, in the thread that received it."""
        if "all" in message:
            with self._changed:
                self.leaving |= message["all"] == FAREWELL
                self._answers[message["all"]] = message["values"]
                self._changed.notify_all()
        elif "asked" in message:
            with self._changed:
                self._held = True
                begun = self._begun
            self._send({"begun": begun})
        elif "stop_at" in message:
            with self._changed:
                self._stop = (message["stop_at"], message["number"])
                self._changed.notify_all()
        elif "end" in message:
            self.end(message["end"], message["code"])

    def end(self, line: str, code: int) -> None:
        """Ends this process with one line, unless it is already leaving."""
        if self.leaving:
            return
        self.leaving = True
        text = f"\n{named(line)}\n" if os.isatty(2) else f"{named(line)}\n"
        with suppress(OSError):
            sys.stdout.flush()
            os.write(2, text.encode(errors="backslashreplace"))
        # At once: the main thread may wait for ever for the process that is gone.
        os._exit(code)

    def lost(self, index: int, reason: LostError) -> None:
        """Ends this process, because process `index` is gone."""
        self.end(describe_loss(index, reason), LOST_CODE)

    def _send(self, message: Message) -> None:
        with suppress(
            LostError
        ):  # whoever receives from process 0 notices it too, and ends this one
            self._send_to_first(message)


def describe_loss(index: int, reason: LostError) -> str:
    """The line with which a process ends that lost another one."""
    return (
        f"error: process {index} is lost ({reason}): the run ends here, the same command continues "
        "from the last checkpoint, also with another number of processes"
    )


def describe_end(error: BaseException) -> tuple[str, int]:
    """(a line about the error that ends a process, its exit code)."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, KeyboardInterrupt):
        stop = stopped(error)
        return str(stop), stop.exit_code
    return f"error: {type(error).__name__}: {brief(error, 300)}", 1
