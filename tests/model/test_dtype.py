"""What `auto` gives each kind of device: compute dtype, experts, attention."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import ModelConfig
from moe_jax.config.presets import PRESETS
from moe_jax.model.attention.cudnn import obstacle
from moe_jax.model.dtype import compute_dtype
from moe_jax.moe.implementation import implementation, missing_kernels
from moe_jax.runs.teacher import task_of
from moe_jax.train import checks
from tests.conftest import make_run

NVIDIA = SimpleNamespace(platform_version="PJRT C API cuda 13000")
AMD = SimpleNamespace(platform_version="PJRT C API rocm 70000")


def on(monkeypatch, backend, client=None, capability=None, installed=True):
    """Makes JAX report such a device. `installed`: whether the kernels' packages are there."""
    device = SimpleNamespace(device_kind="card", client=client, compute_capability=capability)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    spec = object() if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


@pytest.mark.parametrize(
    ("device", "dtype", "experts", "fused_attention"),
    [
        (("cpu",), "float32", "xla", False),
        (("tpu",), "bfloat16", "xla", False),
        (("gpu", NVIDIA, "7.0"), "float32", "xla", False),  # V100
        (("gpu", NVIDIA, "7.5"), "float32", "xla", False),  # T4
        (("gpu", NVIDIA, "8.0"), "bfloat16", "triton", True),  # A100
        (("gpu", NVIDIA, "8.9"), "bfloat16", "triton", True),  # L4
        (("gpu", NVIDIA, "9.0"), "bfloat16", "triton", True),  # H100
        (("gpu", AMD, "gfx942"), "float32", "xla", False),
    ],
)
def test_auto_gives_a_device_what_it_computes_well(
    monkeypatch, device, dtype, experts, fused_attention
):
    on(monkeypatch, *device)
    assert compute_dtype(ModelConfig()).name == dtype
    assert implementation("auto") == experts
    refused = obstacle(compute_dtype(ModelConfig()), 64, 64)
    assert (refused == "") == fused_attention


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_type_that_is_named_is_never_replaced(monkeypatch, name):
    on(monkeypatch, "gpu", NVIDIA, "7.5")
    assert compute_dtype(ModelConfig(compute_dtype=name)) == jnp.dtype(name)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_gives_a_card_what_it_cannot_multiply(monkeypatch, preset):
    model = PRESETS[preset].model
    on(monkeypatch, "gpu", NVIDIA, "7.5")  # T4
    assert compute_dtype(model).name == "float32"
    on(monkeypatch, "gpu", NVIDIA, "9.0")
    assert compute_dtype(model).name == "bfloat16"


def test_bfloat16_by_name_on_a_t4_is_a_line(monkeypatch, capsys, small_run):
    config = replace(small_run, model=replace(small_run.model, compute_dtype="bfloat16"))
    assert task_of(config).config.model.compute_dtype == "bfloat16"
    assert capsys.readouterr().out == ""  # a CPU
    on(monkeypatch, "gpu", NVIDIA, "7.5")
    assert task_of(config).config.model.compute_dtype == "bfloat16"
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("model.compute_dtype=bfloat16 is kept. This GPU has compute capability")
    assert said.endswith(
        "7.5 and no bfloat16 products: values are rounded to bfloat16, and "
        "multiplied in float32 (auto is float32 here)"
    )
    task_of(replace(config, model=replace(config.model, compute_dtype="auto")))
    on(monkeypatch, "gpu", NVIDIA, "8.0")
    task_of(config)
    assert capsys.readouterr().out == ""


def test_a_gpu_without_the_packages_is_told_what_to_install(monkeypatch, capsys, small_run):
    on(monkeypatch, "gpu", NVIDIA, "8.0", installed=False)
    assert implementation("auto") == "xla"
    checks.check_kernels(small_run)
    said = capsys.readouterr()
    line = "experts run on XLA's path: the package triton is not installed (pip install 'moe_jax["
    assert line in said.out + said.err
    assert missing_kernels("xla") == ""  # named: nothing is missing
    on(monkeypatch, "gpu", NVIDIA, "7.5", installed=False)
    assert missing_kernels("auto") == ""  # the packages would not help
    on(monkeypatch, "cpu", installed=False)
    assert missing_kernels("auto") == ""


def test_a_run_keeps_the_type_that_it_began_with(monkeypatch, tmp_path, small_model):
    config = make_run(tmp_path, replace(small_model, compute_dtype="auto"))
    begun = task_of(config).config
    assert begun.model.compute_dtype == "float32"
    monkeypatch.setattr("moe_jax.model.dtype.multiplies_bfloat16", lambda: True)
    assert task_of(config).config.model.compute_dtype == "bfloat16"
    named = replace(config, model=replace(config.model, compute_dtype="float32"))
    assert task_of(named).config.model.compute_dtype == "float32"
