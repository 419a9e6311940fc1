"""The name and the end of one process of several."""

import os
import signal

import pytest

from moe_jax import cli
from moe_jax.base import console, process
from moe_jax.base.errors import UserError
from moe_jax.base.signals import Stopped


@pytest.fixture
def third(monkeypatch):
    """This is process 2 of several, whose end at once is a SystemExit here."""

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(process._This, "index", 2)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr("sys.argv", ["program"])


def test_a_process_alone_has_no_name(capsys):
    assert (process.index(), process.in_group()) == (0, False)
    assert process.named("error: no room") == "error: no room"
    console.say("a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.usefixtures("third")
def test_only_the_first_process_says_anything(capsys):
    console.say("a line")
    with console.progress("reading", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("third")
@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("no room"), "process 2: error: no room\n", 2),
        (Stopped(signal.SIGTERM, "kept"), "process 2: stopped by SIGTERM: kept\n", 143),
    ],
)
def test_errors_are_one_line_with_the_number(capsys, error, line, code):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as end:
        cli.program(main)
    assert end.value.code == code
    assert capsys.readouterr().err == line


@pytest.mark.usefixtures("third")
def test_an_unknown_error_ends_at_once_too(capsys):
    """Python's own way out would wait for threads, which wait for other processes."""

    def main(argv):
        raise KeyError("a defect")

    with pytest.raises(SystemExit) as end:
        cli.program(main)
    assert end.value.code == 1
    assert "KeyError: 'a defect'" in capsys.readouterr().err
