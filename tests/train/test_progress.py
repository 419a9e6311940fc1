import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from moe_jax.base import console as console_module
from moe_jax.train import progress
from moe_jax.train.progress import Display, Speedometer, elapsed_until, fields, fit


def make_line(step, **more):
    return {"step": step, "loss": 3.14159, "load_imbalance": [1.2, 1.5], "dropped": 3, **more}


@pytest.fixture
def clock(monkeypatch):
    """Both of time's clocks, set by hand."""
    now = SimpleNamespace(seconds=100.0)
    for module in (progress, console_module):
        fake = SimpleNamespace(
            perf_counter=lambda: now.seconds,
            monotonic=lambda: now.seconds,
            time=lambda: 1e9 + now.seconds,
        )
        monkeypatch.setattr(module, "time", fake)
    return now


def ticked(speed, clock, step, seconds=2.0):
    clock.seconds += seconds
    line = make_line(step)
    speed.tick(line)
    return line


def test_the_first_line_does_not_speak_of_speed_or_time_left(clock):
    speed = Speedometer(1000, 600)
    first = fields(ticked(speed, clock, 1), speed, 5000.0)
    assert first == ["step 1/600", "loss 3.142", "load max/mean 1.50", "drop 3"]
    second = fields(ticked(speed, clock, 2), speed, 5000.0)
    assert second[1] == "left 0:19:56"
    assert second[3:5] == ["500 tok/s", "10% of a GEMM"]


def test_tokens_and_elapsed_go_on_after_a_resumption(clock):
    speed = Speedometer(1000, 600)
    lines = [ticked(speed, clock, step) for step in (1, 2, 3, 4)]
    assert [line["elapsed"] for line in lines] == [2, 4, 6, 8]
    assert "seconds" not in lines[0]
    clock.seconds += 5000  # the run lies still. Its last checkpoint is that of step 3
    speed = Speedometer(1000, 600, before=elapsed_until(lines, 3))
    line = ticked(speed, clock, 4)
    assert line["tokens"] == 4000
    assert line["elapsed"] == 8
    assert line["time"] == 1e9 + clock.seconds


def test_nothing_has_elapsed_before_the_first_line_or_in_lines_of_before():
    assert elapsed_until([], 0) == 0
    assert elapsed_until([{"step": 1}, {"step": 2, "elapsed": 7.0}], 1) == 0


def test_an_evaluation_is_in_elapsed_and_not_in_the_speed(clock):
    speed = Speedometer(1000, 600)
    ticked(speed, clock, 1)
    ticked(speed, clock, 2)
    speed.pause()
    clock.seconds += 1000
    assert ticked(speed, clock, 3)["elapsed"] == 1006
    assert speed.tokens_per_second == 500


@pytest.mark.parametrize("width", [1, 20, 40, 66, 80, 200])
def test_a_narrow_line_keeps_the_most_useful_fields(clock, width):
    speed = Speedometer(1000, 600)
    ticked(speed, clock, 1)
    line = ticked(speed, clock, 2) | {"validation_bits_per_byte": 1.7}
    whole = fields(line, speed, 5000.0)
    text = fit(whole, width)
    assert len(text) <= max(width, len(whole[0]))
    assert "  ".join(whole).startswith(text)
    assert (width < 66) or "left 0:19:56  loss 3.142" in text


def shown(monkeypatch, clock, terminal, steps=60):
    """What a run of an evaluation every 20 updates of two seconds prints, in 80 columns."""
    written = io.StringIO()
    recording = Console(
        force_terminal=terminal, no_color=True, width=80, soft_wrap=True, file=written
    )
    monkeypatch.setattr(progress, "console", recording)
    speed = Speedometer(1000, steps)
    with Display(steps) as display:
        for step in range(1, steps + 1):
            line = ticked(speed, clock, step)
            if step % 20 == 0:
                display.evaluating(step)
                line["validation_bits_per_byte"] = 2.0
            display.show(line, speed, 5000.0)
    # Cursor movements separate the states of a live line.
    parts = re.split(r"[\r\n]|\x1b\[[\d;?]*[A-HJ-KS-Thl]", written.getvalue())
    return [text for part in parts if (text := re.sub(r"\x1b\[[\d;]*m", "", part)).strip()]


def test_without_a_terminal_a_line_every_fifteen_seconds_and_every_evaluation(monkeypatch, clock):
    lines = shown(monkeypatch, clock, terminal=False)
    steps = [int(line.split()[1].split("/")[0]) for line in lines]
    assert steps == [1, 9, 17, 20, 28, 36, 40, 48, 56, 60]
    assert ["held-out 2.000" in line for line in lines] == [step % 20 == 0 for step in steps]
    assert all("drop 3" in line for line in lines), "a log has room for all fields"


def test_in_a_terminal_no_line_is_longer_than_the_terminal(monkeypatch, clock):
    lines = shown(monkeypatch, clock, terminal=True)
    assert max(len(line) for line in lines) <= 80
    assert sum("held-out 2.000" in line and "60/60" in line for line in lines) >= 1
    assert all("left" in line for line in lines if "tok/s" in line)
