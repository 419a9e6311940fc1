from types import SimpleNamespace

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


def test_short_work_says_nothing(capsys):
    with console.progress("tokenising", 10) as advance:
        advance(10)
    assert capsys.readouterr().err == ""
