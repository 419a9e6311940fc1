"""Schedules beside their simulation: from invented seconds, and the experiment as a whole."""

import json

import pytest

from experiments.pipeline_speed import (
    Settings,
    closed_form,
    main,
    measurements,
    names_of,
    rows_of,
    table_of,
    together,
    verdict,
)
from moe_jax.base.errors import UserError
from moe_jax.parallel.schedules import SCHEDULES, build
from moe_jax.parallel.schedules.split import split_backwards
from moe_jax.study.pipeline_speed import Parts, require_same_loss

EQUAL = Parts(1.0, 1.0, 1.0, first=0.0, pull_first=0.0, last=0.0, messages=0.0)
SETTINGS = Settings(quick=True)


def test_a_simulation_has_the_costs_of_each_piece():
    """GPipe with P = 2 and M = 1: F, F, Bi, Bi beside W, W."""
    schedule = split_backwards(build("gpipe", stages=2, microbatches=1))
    assert EQUAL.simulated(schedule).makespan == 5  # a W lies beside a Bi
    parts = EQUAL._replace(first=0.5, last=0.25, pull_first=0.125)
    # Embedding in tick 1, head in tick 3, the embedding's gradient in tick 4.
    assert parts.simulated(schedule).makespan == 5.875
    assert EQUAL._replace(messages=0.1).simulated(schedule).makespan == pytest.approx(5.4)


def test_a_piece_of_half_a_stage_costs_half():
    schedule = split_backwards(build("zb-v", stages=2, microbatches=3))
    assert sum(EQUAL.simulated(schedule).busy) == 2 * 3 * 3


def test_the_closed_form_is_of_both_devices():
    """1F1B: 8 · 3 of work and a bubble of 3. DualPipeV: two of four stages on each device."""
    parts = [EQUAL]
    assert closed_form(build("1f1b", stages=2, microbatches=8), parts) == 24 / 27
    assert closed_form(build("dualpipev", stages=4, microbatches=8), parts) == 24 / 25


def invented(factor: float) -> dict[str, float]:
    """A round on a machine that is slower by `factor`."""
    seconds = dict(zip(Parts._fields, EQUAL, strict=True))
    for name in ("gpipe", "1f1b", "zb-v"):
        schedule = split_backwards(build(name, stages=2, microbatches=8))
        seconds[name] = 1.05 * EQUAL.simulated(schedule).makespan
        seconds[f"{name}.ticks"] = 0.5
    seconds |= {"once": 48.0, "twice": 50.0}
    return {name: factor * value for name, value in seconds.items()}


def test_ratios_are_of_one_round():
    rounds = [invented(1.0), invented(7.0), invented(1.0)]
    rows = rows_of(rounds, SETTINGS, names_of(SETTINGS))
    assert [row.schedule.name for row in rows] == ["gpipe", "1f1b", "zb-v"]
    for row in rows:
        assert row.agreement == pytest.approx(1.05)
        assert row.efficiency == pytest.approx(row.expected / 1.05)
        assert row.rest == pytest.approx(0.05 * row.simulated / row.ticks)
    values = {m.name: m.value for m in measurements(rows, rounds)}
    assert values["parts_over_once"] == 1
    assert values["gpipe.ticks"] == 26
    assert values["gpipe.measured"] == pytest.approx(1e3 * rows[0].measured)
    assert "| `gpipe` | 26 | 27300 | 26000 | 1.050 | 87.9% | 92.3% | 88.9% |" in table_of(rows)
    assert verdict(rows).startswith("3 of 3 schedules take the simulated time within 10%.")


def test_the_slower_process_counts():
    assert together({"a": 1.0, "once": 5.0}, {"a": 2.0, "once": 0.0}) == {"a": 2.0, "once": 5.0}


def test_every_schedule_exists_for_two_devices():
    assert names_of(Settings()) == list(SCHEDULES)


def test_too_few_micro_batches_leave_schedules_out(capsys):
    assert names_of(Settings(microbatches=2)) == ["gpipe", "1f1b", "interleaved", "zb-h1"]
    assert "left out: zb-v" in capsys.readouterr().out


def test_another_loss_is_an_error():
    require_same_loss({"a": 1.00001}, 1.0)
    with pytest.raises(AssertionError, match=r"b: loss 1\.1 and not 1\.0"):
        require_same_loss({"a": 1.0, "b": 1.1}, 1.0)


def test_one_core_is_too_few(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    with pytest.raises(UserError, match="two cores are needed, and this program may use 1"):
        main(["--out", str(tmp_path)])


@pytest.mark.slow
def test_quick(tmp_path):
    main(["--out", str(tmp_path), "--quick"])
    result = json.loads((tmp_path / "result.json").read_text())
    values = {row["name"]: row["value"] for row in result["measurements"]}
    assert values["zb-v.measured"] > 0
    assert values["messages"] > 0
    assert (tmp_path / "plots" / "efficiency.png").is_file()
