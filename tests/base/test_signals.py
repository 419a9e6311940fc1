import os
import signal

import pytest

from moe_jax.base.signals import STOPPING, Stopped, handled, keeping, stop_request


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
