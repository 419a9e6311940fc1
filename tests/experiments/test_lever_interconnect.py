"""The interconnect from the command: result, picture, one-line errors."""

import json

import pytest

from experiments.lever_interconnect import Settings, main
from moe_jax.base.errors import UserError
from moe_jax.predict.hardware import find_card


def test_result_and_plot(tmp_path):
    main(["--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {m["name"]: m for m in result["measurements"]}
    values = {name: row["value"] for name, row in rows.items()}
    one = "v3_block.1_nodes"
    assert values[f"{one}.pcie4.plain"] > values[f"{one}.nvlink5.plain"] > values[f"{one}.products"]
    low, high = rows[f"{one}.pcie5.best"]["interval"]
    assert low < values[f"{one}.pcie5.best"] < high
    own = find_card("h100").link.rate / 1e9
    assert values[f"{one}.replaces"] == pytest.approx(own / values[f"{one}.equal_rate"])
    assert values["anchor.DeepSeek-V3, hidden.measured"] == 0.963
    assert result["verdict"].startswith("PREDICTED")
    assert (tmp_path / "plots" / "interconnect.png").is_file()


def test_bad_settings():
    with pytest.raises(UserError, match="nodes has 3"):
        Settings(nodes=(3,))
    with pytest.raises(UserError, match="networks has 0"):
        Settings(networks=(0.0,))
    with pytest.raises(UserError, match="tokens=0"):
        Settings(tokens=0)
