"""The package as users get it: built as a wheel, installed in a new environment, used elsewhere."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.small_program import small_settings

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of programs of a new environment with the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True)
    [wheel] = folder.glob("moe_jax-*.whl")
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / "bin"
    subprocess.run([programs / "pip", "install", "-q", wheel], check=True)
    return programs


@pytest.mark.slow
def test_a_wheel_trains_completes_and_lists_its_presets(installed, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}

    def moe_jax(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [installed / "moe-jax", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert "deepseek_v3" in moe_jax("train", "--help")
    texts = tmp_path / "texts"
    texts.mkdir()
    settings = [*small_settings(texts), "--quick", "--steps", "4"]
    said = moe_jax("train", *settings, "--out", "run")
    assert "moe-jax train" not in said  # it suggests nothing where all is well
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["commit"] is None, "an installed package has no checkout"
    assert result["command"].startswith("moe-jax train --model.width 32")
    assert (tmp_path / "run" / "plots" / "load.png").stat().st_size > 0
    completed = moe_jax("complete", "--run", "run", "--text", "value", "--tokens", "5")
    assert completed.startswith("value")
    assert "'moe_jax[sweep]'" in moe_jax("sweep", "train", "--search", "batch=2,4", code=2)
    where = "import moe_jax; print(moe_jax.__file__)"
    python = [installed / "python", "-c", where]
    found = subprocess.run(python, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert str(installed.parent) in found.stdout
