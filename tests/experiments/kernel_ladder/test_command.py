"""The ladder's command, and its recorded results."""

import json
import sys
from pathlib import Path

import pytest

from experiments.kernel_ladder import calibration, cases, gains, run
from experiments.kernel_ladder.rungs import RUNGS
from experiments.kernel_ladder.verdict import verdict
from moe_jax.study.results import read_measurements
from tests.figures import cut_off, overlaps, shown_texts

RESULTS = Path(run.__file__).parent / "results"
DENSE_ABOVE_80_GB = ("DeepSeek-V3",)
"""Layers whose ragged_dot does not fit."""
PREDICTED = Path(run.__file__).parents[2] / "kernels/results/predicted.json"


@pytest.mark.slow
def test_the_experiment_labels_what_it_predicts(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import subprocess

    script = Path(__file__).parents[3] / "experiments/kernel_ladder/run.py"
    command = [sys.executable, script, "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["verdict"].startswith("PREDICTED")
    names = {m["name"] for m in result["measurements"]}
    for m in result["measurements"]:
        assert any(word in m["unit"] for word in ("PREDICTED", "formula", "published"))
        if m["name"].endswith("_low"):
            assert m["name"].removesuffix("_low") + "_high" in names
    assert {f"small_{rung.name}_low" for rung in RUNGS} <= names
    assert (tmp_path / "plots" / "ladder.png").stat().st_size > 1000


@pytest.mark.parametrize("device", ["h100", "a100"])
def test_the_recorded_plot_is_drawn_again_and_is_readable(device, tmp_path, monkeypatch):
    """The plot has every rung and shape of the result, no label over another, and no code name."""
    drawn = []
    monkeypatch.setattr(run, "save_figures", lambda figures, *_: drawn.append(figures["ladder"]))
    run.main(["--recorded", str(RESULTS / f"{device}.json"), "--out", str(tmp_path)])
    figure = drawn[0]
    texts = [text.get_text() for text in shown_texts(figure)]
    assert figure.get_suptitle().startswith("PREDICTED for ")
    assert {"OLMoE-1B-7B", "Qwen3-30B-A3B", "DeepSeek-V3"} < set(texts)
    assert ("SonicMoE, published, forward" in texts) == (device == "h100")
    ranges = [text for text in texts if text.replace(".", "").replace("-", "").isdigit()]
    assert sum("-" in text for text in ranges) >= 75
    assert not overlaps(figure)
    assert not cut_off(figure)
    names = {rung.name for rung in RUNGS}
    assert not names & set(texts)


@pytest.mark.parametrize("device", ["h100", "a100"])
def test_the_recorded_verdict_says_both_readings(device):
    rows = read_measurements(RESULTS / f"{device}.json")
    found = gains.recorded_gains(rows, cases.SHAPES)
    recorded = json.loads((RESULTS / f"{device}.json").read_text())["verdict"]
    label = recorded.split(". ")[0]
    assert verdict(found, label) == recorded
    assert "Against XLA's own path" in recorded
    assert "Against jax.lax.ragged_dot, which JAX users have" in recorded
    assert "5.2x forward, 1.9x forward and backward, 3.1x train step" in recorded
    assert all(
        low.value <= rows[n[:-3] + "high"].value for n, low in rows.items() if n.endswith("_low")
    )


def test_the_recorded_prediction_has_every_launch_and_layer():
    content = json.loads(PREDICTED.read_text())
    assert content["device"] == "NVIDIA H100 80GB HBM3"
    assert content["model"] == calibration.VERSION
    assert len(content["date"]) == 10
    shapes = {row["shape"] for row in content["launches"]}
    assert shapes == set(cases.FIRST_RUN)
    for name, shape in cases.FIRST_RUN.items():
        rows = {row["launch"]: row for row in content["launches"] if row["shape"] == name}
        assert set(rows) == {
            "gate", "schedule", "up", "down", "combine", "hidden gradient", "down gradient",
            "gate_up gradient", "input gradient", "combine, unweighted",
        }  # fmt: skip
        assert sum(row["flops"] for row in rows.values()) == 3 * shape.flops
        layers = {
            (row["kind"], row["implementation"]): row
            for row in content["layers"]
            if row["shape"] == name
        }
        absent = {
            (row["kind"], row["implementation"])
            for row in content["left_out"]
            if row["shape"] == name
        }
        assert len(layers) + len(absent) == 6
        assert not absent & set(layers)
        assert bool(absent) == (name in DENSE_ABOVE_80_GB)
        for row in (*rows.values(), *layers.values()):
            assert 0 < row["seconds_low"] < row["seconds_high"]
            assert row["seconds_low"] >= row.get("seconds_bound", 0)
        # A training step is its launches, but for the gate.
        for end in ("seconds_low", "seconds_high"):
            parts = sum(row[end] for launch, row in rows.items() if launch != "gate")
            assert layers["train", "triton"][end] == pytest.approx(parts, rel=0.05)
