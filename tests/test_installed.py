"""The package as users get it: a wheel in a new environment of each Python, used elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_program import small_settings

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")


def interpreter(version: str) -> str | None:
    """A Python of this version that works. None: there is none here."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")]
    for found in filter(None, candidates):
        if subprocess.run([found, "-c", "import venv"], capture_output=True).returncode == 0:
            return str(found)
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The package as a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True)
    [wheel] = folder.glob("moe_jax-*.whl")
    return wheel


@pytest.fixture(scope="module", params=VERSIONS)
def installed(request, wheel, tmp_path_factory) -> Path:
    """The folder of programs of a new environment with the wheel and its dependencies."""
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"no Python {request.param} is here")
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    programs = folder / "bin"
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
    assert str(installed.parent) in found.stdout, "it ran from the wheel"
