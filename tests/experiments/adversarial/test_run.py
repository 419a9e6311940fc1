"""The adversarial experiment from its command line."""

import json

import pytest

from experiments.adversarial import run


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    run.main(["--quick", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    names = {m["name"] for m in result["measurements"]}
    for kind in ("data", "generative", "perturbation"):
        assert {f"{kind}_minus_kd_bits", f"{kind}_control_minus_kd_bits"} <= names
    for part in run.PARTS:
        assert (tmp_path / "plots" / f"{part}.png").exists()
