"""The pipelines' lever on one small case: result, pictures, and the crossing of two curves."""

import json

import pytest

from experiments import lever_pipeline
from experiments.lever_pipeline import Settings, crossing, main
from moe_jax.base.errors import UserError
from moe_jax.predict.layouts.fastest import FSDP, Layout
from moe_jax.predict.layouts.fsdp import Update
from moe_jax.study.pipeline_choice.sweep import Case

SMALL = Case("small", "16 blocks of OLMoE on 4 H100", "olmoe_1b_7b", 16, "h100", 4, inside=True)


def test_result_and_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lever_pipeline, "CASES", (None, SMALL))
    main(["--quick", "--rows", "2", "--limits", "80", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    values = {m["name"]: m["value"] for m in result["measurements"]}
    assert values["small.12.1f1b"] > values["small.ideal"]
    assert values["small.12.gain"] > values["small.48.5.gain"] > 0
    parts = ("work", "waiting", "messages", "overhead")
    assert all(values[f"small.tick_{part}"] >= 0 for part in parts)
    assert values["published.over_1f1b.interleaved, 405B, 512 H100"] == 1.28
    assert result["verdict"].startswith("SIMULATED")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"choice.png", "winners.png"}
    assert "x FSDP" in capsys.readouterr().out


def points(gains: dict[float, float]):
    """A sweep in which the pipeline has these gains over FSDP."""
    return [
        (
            1e9 * rate,
            {
                FSDP: Layout(FSDP, 1, 1, "none", Update(gain, 1.0)),
                "1f1b": Layout("1f1b", 4, 1, "none", Update(1.0, 1.0)),
            },
        )
        for rate, gain in gains.items()
    ]


def test_crossing():
    sweep = points({1: 8.0, 4: 2.0, 16: 0.5})
    assert crossing(sweep) == pytest.approx(8.0)
    assert crossing(sweep, 2.0) == pytest.approx(4.0)
    assert crossing(sweep, 16.0) is None
    assert crossing(points({1: 3.0, 2: 2.0})) is None


def test_bad_settings():
    with pytest.raises(UserError, match="rates has 0"):
        Settings(rates=(0.0,))
    with pytest.raises(UserError, match="rows=0"):
        Settings(rows=0)
