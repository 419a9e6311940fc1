import os
import signal

import pytest

from moe_jax.base.signals import Stopped, handled, keeping, stop_request


def send(number):
    os.kill(os.getpid(), number)


def test_a_request_lets_the_work_end_itself():
    before = signal.getsignal(signal.SIGTERM)
    done = []
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM$") as stopped, stop_request() as stop:
        assert stop.number is None
        send(signal.SIGTERM)
        send(signal.SIGUSR1)  # any number of these is one request
        send(signal.SIGUSR1)
        assert stop.number == signal.SIGTERM
        done.append("saved")
    assert done == ["saved"]
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_does_not_wait():
    with pytest.raises(Stopped, match="SIGINT"), stop_request():
        send(signal.SIGTERM)
        send(signal.SIGINT)
        pytest.fail("it went on")


def test_a_program_is_stopped_at_once_and_says_what_is_kept():
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(Stopped, match=r"^stopped by SIGINT: step 3 is saved$"), handled():
            with keeping(lambda: "step 3 is saved"), keeping(lambda: "an inner detail"):
                send(signal.SIGINT)
                pytest.fail("it went on")
    finally:  # after a stop, further signals end the program
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_an_error_prevails_over_a_request():
    with pytest.raises(ZeroDivisionError), stop_request():
        send(signal.SIGTERM)
        raise ZeroDivisionError
