"""The loads of a run that places experts by load, read from its metrics."""

import json

import numpy as np
import pytest

from experiments.rebalancing import main, verdict
from moe_jax.cli import override
from moe_jax.config.presets import TINY
from moe_jax.study.rebalancing import Settings, draw, loads_of, measurements, options


def write(path, imbalances):
    """A run of four experts in one layer on two devices, placed after steps 2 and 4."""
    with path.open("w") as file:
        for step, own in enumerate(imbalances, 1):
            line = {"step": step, "load": [[6, 2, 1, 1]], "device_imbalance": [own]}
            if step % 2 == 0:
                line["experts_moved"] = step
            file.write(json.dumps(line) + "\n")


def test_loads_before_and_after_are_means_after_the_first_placement(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1.6, 1.6, 1.2, 1.4])
    loads = loads_of(path, 2)
    np.testing.assert_allclose(loads.before, [[1.6]] * 4)  # 6 + 2 of ten, over a mean of 5
    rows = {m.name: m for m in measurements(loads, loads, 2, 0)}
    assert rows["eplb_load_before"].value == pytest.approx(1.6)
    assert rows["eplb_load_after"].value == pytest.approx(1.3)
    assert rows["eplb_load_after"].ratio == pytest.approx(1.3 / 1.6)
    assert rows["eplb_moved"].value == 3
    assert "1.60 times the mean" in verdict({name: m.value for name, m in rows.items()})
    assert len(draw(loads, loads, 2).axes[0].lines) == 4


def test_its_options_are_a_run_that_writes_all_loads():
    config = override(TINY, {name: str(value) for name, value in options(Settings(), 2).items()})
    assert config.parallel.exchange.rebalance == 10
    assert config.steps < 200


@pytest.mark.slow
def test_quick(tmp_path):
    """Four simulated devices. The load of devices must fall."""
    main(["--out", str(tmp_path), "--quick"])
    result = json.loads((tmp_path / "result.json").read_text())
    values = {m["name"]: m["value"] for m in result["measurements"]}
    assert 1 <= values["eplb_load_after"] < values["eplb_load_before"]
    assert 0 < values["eplb_moved_bounded"] <= 2
