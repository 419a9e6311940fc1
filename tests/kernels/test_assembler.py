"""PTX that the assembler which jaxlib uses can read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from moe_kernels.launch import assembler

LAYER = """
import sys
import jax, jax.numpy as jnp
from moe_kernels.experts import mixture
from moe_kernels.gate import GateConfig, gate
from moe_kernels.launch import lowering_for
from moe_kernels.schedule import schedule

def layer(logits, x, gate_up, down):
    chosen = gate(logits, None, GateConfig(2, "softmax"))
    plan = schedule(chosen.experts, 4, 16)
    return mixture(x, chosen.weights, gate_up, down, plan).sum()

bf16 = jnp.bfloat16
shapes = [((64, 4), jnp.float32), ((64, 64), bf16), ((4, 64, 64), bf16), ((4, 32, 64), bf16)]
arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
for arch in map(int, sys.argv[1:]):
    jax.clear_caches()  # the architecture is no argument of what is traced
    with lowering_for(arch):
        step = jax.jit(jax.grad(layer, argnums=(0, 1, 2, 3))).trace(*arrays)
        step.lower(lowering_platforms=("cuda",))
"""


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
    command = [sys.executable, "-c", LAYER, "80", "89", "90", "100"]
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    sources = list(Path(tmp_path).rglob("*.ptx"))
    targets = set()
    for source in sources:
        target = source.read_text().split(".target ")[1].split()[0].strip(",")
        targets.add(target)
        output = ["-o", tmp_path / "kernel.cubin"]
        done = subprocess.run(
            [oldest.path, f"--gpu-name={target}", source, *output],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert targets == {"sm_80", "sm_89", "sm_90a", "sm_100a"}
