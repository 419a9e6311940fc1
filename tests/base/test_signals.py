import os
import signal
import subprocess
import sys
import time

import pytest

from moe_jax.base.signals import GRACE, STOPPING, Stopped, handled, keeping, stop_request

BUSY = """
import hashlib
from contextlib import nullcontext
from threading import Timer
from moe_jax.base.signals import handled, keeping, stop_request

with handled(), keeping(lambda: "step 3 is saved"), {block}():
    Timer(0.5, print, ["ready"], dict(flush=True)).start()  # when the call below has begun
    # As in a compiler, no handler of Python's runs before this call returns, in some minutes.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
SWALLOWING = """
import gc, time
from moe_jax.base.signals import handled, keeping

def slow(phase, info):  # what is raised in here is ignored
    if not ready:
        ready.append(print("ready", flush=True))
        time.sleep(1)

ready = []
gc.callbacks.append(slow)
with handled(), keeping(lambda: "step 3 is saved"):
    gc.collect()
    time.sleep(20)
"""
QUICKLY = 0.9 * GRACE
"""Seconds that a busy machine may take to end a process at once."""


class Busy:
    """A real process whose main thread runs no handlers."""

    def __init__(self, code):
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def send(self, number):
        self.process.send_signal(number)
        self.sent = time.monotonic()

    def lives(self, seconds):
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def ended(self):
        """Exit code, lines on stderr, seconds since the last signal."""
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said.split("\n"), time.monotonic() - self.sent


@pytest.mark.parametrize("block", ["nullcontext", "stop_request"])
def test_a_second_signal_ends_a_process_at_once_that_heeds_none(block):
    busy = Busy(BUSY.format(block=block))
    busy.send(signal.SIGTERM)
    assert busy.lives(0.1)  # two signals of one kind at the same moment are one
    busy.send(signal.SIGINT)
    code, lines, seconds = busy.ended()
    assert (code, seconds < QUICKLY) == (130, True)
    assert "ended at once by a second signal" in lines
    assert "Traceback" not in "".join(lines)


def test_one_signal_leaves_a_second_of_grace():
    busy = Busy(BUSY.format(block="nullcontext"))
    busy.send(signal.SIGTERM)
    code, lines, seconds = busy.ended()
    assert code == 143
    assert GRACE - 0.1 < seconds < GRACE + 5
    assert [line for line in lines if line] == ["stopped by SIGTERM: step 3 is saved"]


def test_a_signal_whose_exception_is_ignored_is_heeded_all_the_same():
    busy = Busy(SWALLOWING)
    assert busy.lives(0.1)
    busy.send(signal.SIGTERM)
    code, lines, seconds = busy.ended()
    assert seconds < 5
    assert code == 1  # Python's own: the exception left the program, which has no main
    assert lines[-2] == "moe_jax.base.signals.Stopped: stopped by SIGTERM: step 3 is saved"
    assert "Exception ignored" not in "".join(lines)


def test_a_request_that_repeats_is_no_second_signal():
    busy = Busy(BUSY.format(block="stop_request"))
    for _ in range(3):
        busy.send(signal.SIGUSR1)
        assert busy.lives(GRACE / 2)  # what saves has as long as it takes
    busy.send(signal.SIGTERM)
    assert busy.lives(0.1)
    busy.send(signal.SIGTERM)
    code, _, seconds = busy.ended()
    assert (code, seconds < QUICKLY) == (143, True)


def send(number):
    os.kill(os.getpid(), number)


def test_a_request_lets_the_work_end_itself():
    before = signal.getsignal(signal.SIGTERM)
    done = []

    def work():
        with stop_request() as stop:
            assert stop.number is None
            send(signal.SIGTERM)
            send(signal.SIGUSR1)  # any number of these is one request
            send(signal.SIGUSR1)
            assert stop.number == signal.SIGTERM
            done.append("saved")

    with pytest.raises(Stopped, match=r"^stopped by SIGTERM$") as stopped:
        work()
    assert done == ["saved"]
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_does_not_wait():
    def work():
        with stop_request():
            send(signal.SIGTERM)
            send(signal.SIGINT)
            pytest.fail("it went on")

    with pytest.raises(Stopped, match="SIGINT"):
        work()


def test_a_program_is_stopped_at_once_and_says_what_is_kept():
    def work():
        with handled(), keeping(lambda: "step 3 is saved"), keeping(lambda: "an inner detail"):
            send(signal.SIGINT)
            pytest.fail("it went on")

    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        with pytest.raises(Stopped, match=r"^stopped by SIGINT: step 3 is saved$"):
            work()
        # After a stop, a further signal ends the program.
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_error_prevails_over_a_request():
    def work():
        with stop_request():
            send(signal.SIGTERM)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
