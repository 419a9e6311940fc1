"""The statistics of the FP8 comparison, and the command itself (slow)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import fp8_numerics

SCRIPT = Path(__file__).parents[2] / "experiments" / "fp8_numerics.py"


def values(losses, seeds):
    return {m.name: m.value for m in fp8_numerics.measurements(losses, seeds)}


def test_differences_are_paired_by_seed():
    found = values({"float32": [2.0, 3.0, 4.0], "fp8": [2.1, 3.2, 4.3]}, [0, 1, 2])
    assert found["fp8.loss"] == pytest.approx(3.2)
    assert found["fp8.difference"] == pytest.approx(0.2)
    # Student's t with 2 degrees of freedom is 4.3027 at 97.5%; 0.1, 0.2, 0.3 deviate by 0.1.
    assert found["fp8.difference_95"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert "fp8 +0.2000 bits/byte (+-0.2484, +6.67%)" in fp8_numerics.verdict(found)


def test_one_seed_has_no_interval():
    found = values({"float32": [2.0], "fp8": [2.1]}, [0])
    assert found["fp8.difference_95"] is None
    assert "(one seed, +5.00%)" in fp8_numerics.verdict(found)


@pytest.mark.parametrize("name", fp8_numerics.PRECISIONS)
def test_runs_differ_in_precision_alone(name):
    config = fp8_numerics.run_config(fp8_numerics.Settings(), name, 3)
    assert (config.seed, config.steps) == (3, 200)
    plain = fp8_numerics.run_config(fp8_numerics.Settings(), "float32", 3)
    assert (config.model == plain.model) == (name == "float32")
    assert (config.data, config.optim) == (plain.data, plain.optim)


@pytest.mark.slow
def test_quick_run(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert {m["name"] for m in result["measurements"]} >= {"float32.loss", "fp8.difference"}
