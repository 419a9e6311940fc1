"""Signals that ask a program to stop. The first one is heeded, the second ends the process at once.

A program's work is inside `handled`, where a signal raises Stopped. Work that must come to a good
end first is inside `stop_request`. `keeping` adds to the message what the next start will find.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from moe_jax.base.process import named

REPEATABLE = signal.SIGUSR1
"""Asks to stop however often it comes. A program sends it to its child, which may have had the
same Ctrl-C already. SLURM sends it where a job asks for --signal=USR1@60."""
STOPPING = (signal.SIGINT, signal.SIGTERM, REPEATABLE)
"""Ctrl-C, what a cluster sends before it takes the machine away, and REPEATABLE."""
GRACE = 1.0
"""Seconds after which a process is ended that a library keeps from running Python's handlers."""


class Stopped(KeyboardInterrupt):
    """A signal has ended the work. The message names it, and says what is kept."""

    def __init__(self, number: int, kept: str = "") -> None:
        self.number = signal.Signals(number)
        super().__init__(f"stopped by {self.number.name}" + (f": {kept}" if kept else ""))

    @property
    def exit_code(self) -> int:
        """As shells give it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


def stopped(interrupt: KeyboardInterrupt, kept: str = "") -> Stopped:
    """`interrupt` with the words of `kept`. Python's own KeyboardInterrupt counts as SIGINT."""
    number = interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT
    return Stopped(number, kept) if kept or not isinstance(interrupt, Stopped) else interrupt


class StopRequest:
    """Whether a signal has asked to stop."""

    number: signal.Signals | None = None
    """The signal. None: there was none."""


class _Process:
    """What the handlers and the watching thread share."""

    raised = threading.Event()
    """A handler has raised Stopped."""
    swallowed: int | None = None
    """A signal whose Stopped was lost, because it was raised where Python ignores exceptions."""
    deferring = False
    """A stop_request is open: the work ends itself."""
    kept: tuple[Callable[[], str], ...] = ()
    """The descriptions of the open `keeping` blocks, the outermost first."""


@contextmanager
def keeping(describe: Callable[[], str]) -> Iterator[None]:
    """Adds describe() to the message, should a signal end the block. The outermost block counts."""
    before = _Process.kept
    _Process.kept = (*before, describe)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise stopped(interrupt, describe()) from None
    finally:
        _Process.kept = before


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Inside the block a signal sets the request's `number` and interrupts nothing.

    If there was one, Stopped is raised at the end of the block. A second signal raises it at once.
    Outside the main thread no signal arrives, and the request stays unset.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if request.number is None:
            request.number = signal.Signals(number)
            _tell(f"{request.number.name}: saving first. A second signal ends the run at once")
        elif number != REPEATABLE:
            raise Stopped(number)

    with _handlers(note):
        before = _Process.deferring
        _Process.deferring = True
        try:
            yield request
        finally:
            _Process.deferring = before
    if request.number is not None:
        _Process.raised.set()  # a later signal finds that this one is being heeded
        raise Stopped(request.number)


@contextmanager
def handled() -> Iterator[None]:
    """Inside the block a signal raises Stopped. A second one ends the process."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not _Process.raised.is_set():  # otherwise the program is ending already
            _Process.raised.set()
            raise Stopped(_Process.swallowed or number)

    _Process.raised.clear()
    _Process.swallowed = None
    installed = False
    try:
        with _handlers(interrupt) as installed, _watched(installed), _raised_again(installed):
            yield
    finally:
        if installed and _Process.raised.is_set():
            # Whatever Python still waits for while it shuts down, a further signal ends it.
            for number in STOPPING:
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[bool]:
    """Installs `handler` for the block. False: signals are none of this thread's business."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    # A process in the background of a shell ignores SIGINT. It still does.
    numbers = [n for n in STOPPING if signal.getsignal(n) is not signal.SIG_IGN]
    before: dict[int, Any] = {n: signal.signal(n, handler) for n in numbers}
    try:
        yield True
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextmanager
def _raised_again(installed: bool) -> Iterator[None]:
    """Asks again where Stopped was raised in a finaliser, or a callback of the garbage collector.

    Python ignores exceptions there, and the program would go on.
    """
    if not installed:
        yield
        return
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Stopped):
            before(unraisable)
            return
        _Process.swallowed = unraisable.exc_value.number
        _Process.raised.clear()
        # Not now: the handler would run inside this very call.
        again = threading.Timer(0.02, os.kill, (os.getpid(), REPEATABLE))
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def _watched(installed: bool) -> Iterator[None]:
    """A thread sees the signals as well, because Python's handlers wait for the main thread.

    The main thread may be inside the compiler for minutes.
    """
    if not installed:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # set_wakeup_fd asks for it
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)  # the thread reads its end


def _watch(reader: int) -> None:
    """Ends the process at a second signal, or at one that the main thread cannot heed."""
    pipe = select.poll()  # select.select takes no descriptor above 1023
    pipe.register(reader, select.POLLIN)
    count = 0
    unheeded: tuple[int, float] | None = None  # a signal, and when it must have been heeded
    while True:
        left = None if unheeded is None else max(0.0, unheeded[1] - time.monotonic())
        if not pipe.poll(None if left is None else 1000 * left):
            assert unheeded is not None
            if not _Process.raised.is_set():
                kept = _Process.kept[0]() if _Process.kept else ""
                _end(unheeded[0], str(Stopped(unheeded[0], kept)))
            unheeded = None
            continue
        byte = os.read(reader, 1)
        if not byte:
            break  # the block has ended
        number = byte[0]
        if number not in STOPPING:
            continue
        count += number != REPEATABLE
        if count > 1:
            _end(number, "ended at once by a second signal")
        if not _Process.deferring and unheeded is None:
            unheeded = (number, time.monotonic() + GRACE)
    os.close(reader)


def _end(number: int, line: str) -> None:
    # A live line hides the cursor.
    _tell(line + ("\x1b[?25h" if os.isatty(2) else ""))
    sys.stdout.flush()  # _exit drops what Python has buffered
    os._exit(128 + number)


def _tell(line: str) -> None:
    """A line on stderr. Not by print, because a handler may run inside another print."""
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{named(line)}\n".encode())
