"""The speeds of one and two processes: ratios within a round, and the experiment as a whole."""

import json
import os

import pytest

from experiments.process_scaling import arms, main, measure, verdict
from moe_jax.base.errors import UserError


def test_arms_use_two_cores():
    for name, arm in arms(3, 5).items():
        assert {core for cores in arm.cores for core in cores} <= {3, 5}
        assert (arm.batches == 2) == (name == "weak")


def test_ratios_are_of_one_round():
    """The second round has a slow machine."""
    seconds = {"one_process": [2.0, 20.0, 2.0], "strong": [1.0, 10.0, 1.0]}
    seconds |= {"weak": [1.6, 16.0, 1.6], "one_process_two_cores": [4.0, 40.0, 4.0]}
    found = measure(seconds)
    values = {m.name: m.value for m in found}
    assert values["strong.speedup"] == 2
    assert values["weak.speedup"] == pytest.approx(1.25)
    assert values["one_process.tokens_per_second"] == 0.5
    assert "two processes are 2.00x as fast as one at the same batch and 1.25x" in verdict(found)
    assert verdict(found).endswith("one process with both cores is 0.50x as fast")


def test_one_core_is_too_few(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    with pytest.raises(UserError, match="two cores are needed, and this program may use 1"):
        main(["--out", str(tmp_path)])


@pytest.mark.slow
def test_quick(tmp_path):
    main(["--out", str(tmp_path), "--quick"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["measurements"]) == 8
    assert all(m["value"] > 0 for m in result["measurements"])
