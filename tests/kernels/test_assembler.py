"""PTX that the assembler which jaxlib uses can read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from moe_kernels.launch import assembler

LAYER = Path(__file__).with_name("lower_layer.py")


def fake(folder, release):
    path = folder / f"ptxas-{release}"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    assembler.oldest_assembler.cache_clear()
    yield
    assembler.oldest_assembler.cache_clear()


def test_the_oldest_assembler_decides(monkeypatch, tmp_path):
    paths = [fake(tmp_path, release) for release in ("13.0", "12.8", "12.10")]
    broken = tmp_path / "broken"
    broken.write_text("no program")
    monkeypatch.setattr(assembler, "candidates", lambda: iter([*paths, broken]))
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", "the user's")
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    assembler.choose_assembler()
    assert os.environ.pop("TRITON_PTXAS_PATH") == str(paths[1])
    assert os.environ["TRITON_PTXAS_BLACKWELL_PATH"] == "the user's"


def test_triton_keeps_an_assembler_that_is_as_old(monkeypatch, tmp_path):
    own = {"ptxas": fake(tmp_path, "12.8"), "ptxas-blackwell": fake(tmp_path, "13.4")}
    other = fake(tmp_path, "13.0")
    monkeypatch.setattr(assembler, "candidates", lambda: iter([other]))
    monkeypatch.setattr(assembler, "bundled", own.__getitem__)
    for variable in assembler.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assembler.choose_assembler()
    # PTX for 12.8 is taken by 13.0 and by everything between. PTX for 13.4 is not.
    assert "TRITON_PTXAS_PATH" not in os.environ
    assert os.environ.pop("TRITON_PTXAS_BLACKWELL_PATH") == str(other)


def test_tritons_own_assemblers_are_found():
    pytest.importorskip("triton")
    assert assembler.release_of(assembler.bundled("ptxas")) is not None


def test_without_an_assembler_triton_keeps_its_own(monkeypatch):
    monkeypatch.setattr(assembler, "candidates", lambda: iter([]))
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    assembler.choose_assembler()
    assert "TRITON_PTXAS_PATH" not in os.environ


def test_an_older_assembler_takes_the_ptx_of_a_layer(tmp_path):
    pytest.importorskip("jax_cuda13_plugin")
    oldest = assembler.oldest_assembler()
    if oldest is None:
        pytest.skip("no ptxas besides Triton's (the package nvidia-cuda-nvcc has one)")
    drop = ("TRITON_INTERPRET", *assembler.VARIABLES)
    environment = {k: v for k, v in os.environ.items() if k not in drop}
    environment |= {"JAX_TRITON_DUMP_DIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "c")}
    command = [sys.executable, LAYER, "80", "89", "90", "100"]
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert assembled(tmp_path, oldest.path) == {"sm_80", "sm_89", "sm_90a", "sm_100a"}


def assembled(folder, ptxas):
    """The architectures of all PTX below a folder, which the assembler must take."""
    targets = set()
    for source in folder.rglob("*.ptx"):
        target = source.read_text().split(".target ")[1].split()[0].strip(",")
        targets.add(target)
        command = [ptxas, f"--gpu-name={target}", source, "-o", folder / "kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return targets
