"""The package as users get it: a wheel in a new environment of each Python, used elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.small_program import small_settings

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13")
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The version that runs the tests."""


def interpreter(version: str) -> str | None:
    """A Python of this version that works. None: there is none here."""
    if version == OWN:
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")]
    for found in filter(None, candidates):
        if (
            subprocess.run([found, "-c", "import ensurepip, venv"], capture_output=True).returncode
            == 0
        ):
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
    return install(request.param, wheel, tmp_path_factory.mktemp("installed"))


def install(version: str, wheel: Path, folder: Path) -> Path:
    """The programs of a new environment of this Python. Skips the test where there is none."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} is here: the wheel is NOT tried with it")
    subprocess.run([python, "-m", "venv", str(folder / "venv")], check=True)
    programs = folder / "venv" / "bin"
    subprocess.run([programs / "pip", "install", "-q", wheel], check=True)
    return programs


def call(program: Path, *words: str, cwd: Path, code: int = 0) -> str:
    """What a program of an environment prints, away from the checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        [program, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_wheel_trains_and_completes(installed, tmp_path):
    moe_jax = partial(call, installed / "moe-jax", cwd=tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    said = moe_jax("train", *small_settings(texts), "--quick", "--steps", "4", "--out", "run")
    assert "moe-jax train" not in said  # it suggests nothing where all is well
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["commit"] is None, "an installed package has no checkout"
    assert result["command"].startswith("moe-jax train --model.width 32")
    assert (tmp_path / "run" / "plots" / "load.png").stat().st_size > 0
    completed = moe_jax("complete", "--run", "run", "--text", "value", "--tokens", "5")
    assert completed.startswith("value")
    if installed_version(installed) == OWN:  # with the others a short run is enough
        assert "deepseek_v3" in moe_jax("train", "--help")
        assert "'moe_jax[sweep]'" in moe_jax("sweep", "train", "--search", "batch=2,4", code=2)
        where = call(
            installed / "python", "-c", "import moe_jax; print(moe_jax.__file__)", cwd=tmp_path
        )
        assert str(installed.parent) in where, "it ran from the wheel"


def installed_version(programs: Path) -> str:
    """Such as 3.11."""
    said = call(programs / "python", "--version", cwd=programs)
    return ".".join(said.split()[1].split(".")[:2])


def test_a_python_that_is_missing_is_named():
    with pytest.raises(pytest.skip.Exception, match=r"no Python 2\.99 is here: .* NOT tried"):
        install("2.99", Path("none.whl"), Path("none"))
