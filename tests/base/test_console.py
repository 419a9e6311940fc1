import io
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from moe_jax.base import console


def test_progress_without_a_terminal_is_a_line_every_fifteen_seconds(monkeypatch, capsys):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    with console.progress("tokenising", 40_000_000) as advance:
        for _ in range(40):
            now.seconds += 1
            advance(1_000_000)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "tokenising: 15.0 of 40.0 MB, 0:00:25 left",
        "tokenising: 30.0 of 40.0 MB, 0:00:10 left",
    ]


def test_long_evaluations_print_a_line_every_fifteen_seconds(monkeypatch, capsys):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    for item in console.paced(range(8), "evaluating, batch", 8):
        now.seconds += 5
        assert item * 5 + 5 == now.seconds
    assert capsys.readouterr().out.splitlines() == [
        "evaluating, batch: 3 of 8, 0:00:25 left",
        "evaluating, batch: 6 of 8, 0:00:10 left",
    ]


def test_items_are_counted_and_not_measured_in_megabytes(monkeypatch, capsys):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    for _ in console.track(range(3), "rounds"):
        now.seconds += 10
    assert capsys.readouterr().err.splitlines() == ["rounds: 2 of 3, 0:00:10 left"]


def test_work_without_an_end_in_sight_tells_its_time_until_it_ends(monkeypatch, capsys):
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.05)
    with console.working("compiling"):
        time.sleep(0.2)
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 4
    assert set(said) == {"compiling: 0:00:00 so far"}
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unit", ["bytes", "items"])
def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch, unit):
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=80)
    monkeypatch.setattr(console, "open_console", lambda stderr: terminal)
    with console.progress("reading", 4, unit) as advance:
        advance(4)
    with console.working("compiling"):
        pass
    assert "reading" in written.getvalue()
    assert "compiling" in written.getvalue()
    assert written.getvalue().endswith("\x1b[2K"), "the last line is erased"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_library_s_own_bars_are_for_terminals(monkeypatch, terminal):
    shown = Console(file=io.StringIO(), force_terminal=terminal)
    monkeypatch.setattr(console, "open_console", lambda stderr: shown)
    turned_off = []
    with console.downloading("loading", lambda: turned_off.append(True)):
        pass
    assert bool(turned_off) == (not terminal)


def test_short_work_says_nothing(capsys):
    with console.progress("tokenising", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""
