import json
import subprocess
import sys
from pathlib import Path

from moe_jax.config.presets import PRESETS

SCRIPT = Path(__file__).parent.parent.parent / "experiments" / "parameters.py"


def test_every_preset_is_counted_and_every_difference_explained(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "UNEXPLAINED" not in printed
    result = json.loads((tmp_path / "result.json").read_text())
    values = {m["name"]: m["value"] for m in result["measurements"]}
    for name in PRESETS:
        assert values[f"{name}.total"] >= values[f"{name}.active"] > 0
    # the release has 671,026,419,200 with the 58 x 256 router biases, which are no parameters here
    assert values["deepseek_v3.total"] == 671_026_419_200 - 58 * 256
