"""Where kernels can run, and the reason where they cannot."""

import importlib.util
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import moe_kernels.audit.__main__ as audit
import moe_kernels.bench.__main__ as bench
import moe_kernels.soak.__main__ as soak
import numpy as np
import pytest
from moe_kernels.launch import capability, launch_fault, lowering_for, probe, triton_support
from moe_kernels.quantise import quantise_rows


@pytest.fixture(autouse=True)
def triton_installed(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def on_gpu(monkeypatch, capability):
    device = SimpleNamespace(device_kind="card", compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])


def test_a_cpu_has_no_support_and_says_why():
    assert triton_support() == ("none", "the devices are cpu, not NVIDIA GPUs")


def test_interpreter_when_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_support().name == "interpreter"


@pytest.mark.parametrize(("capability", "name"), [("7.5", "none"), ("8.0", "gpu"), ("9.0", "gpu")])
def test_gpus_by_compute_capability(monkeypatch, capability, name):
    on_gpu(monkeypatch, capability)
    support = triton_support()
    assert support.name == name
    assert capability in support.reason


# torch brings triton, but not jax_triton.
@pytest.mark.parametrize("missing", ["triton", "jax_triton"])
def test_without_a_package_the_reason_names_the_extra(monkeypatch, missing):
    on_gpu(monkeypatch, "9.0")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else object()
    )
    name, reason = triton_support()
    assert name == "none"
    assert reason.startswith(f"the package {missing} is not installed (pip install 'moe_jax[kern")


def test_a_gpu_of_another_maker_has_no_support(monkeypatch):
    on_gpu(monkeypatch, "gfx942")
    assert triton_support() == ("none", "card (gfx942) is not an NVIDIA GPU")
    assert capability() == 90


def test_a_small_kernel_shows_whether_the_way_to_the_device_holds(monkeypatch):
    # Inside a trace as well, where `auto` asks: it is run there, and not traced.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    faults = []

    def traced(x):
        faults.append(launch_fault.__wrapped__())
        return x

    jax.jit(traced)(1.0)
    assert faults == [""]


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (
            RuntimeError("Unsupported .version 9.4"),
            r"fails: RuntimeError: Unsupported .* \(ptxas: ",
        ),
        (jnp.zeros((64, 64)), "gives wrong numbers"),
    ],
)
def test_a_small_kernel_that_fails_gives_the_reason_and_the_assemblers(monkeypatch, result, fault):
    def product(a, b):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(probe, "probe_product", product)
    assert re.search(fault, launch_fault.__wrapped__())


def test_lowering_for_a_card_that_is_too_old():
    with lowering_for(75):
        support = triton_support()
    assert support.name == "none"
    assert "7.5 is below 8.0" in support.reason


@pytest.mark.slow
def test_kernels_that_do_not_wait_for_each_other_are_interpreted_one_at_a_time(monkeypatch):
    monkeypatch.undo()
    # Before the first import of Triton, which reads the variable once.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    x = jnp.arange(40 * 1000.0).reshape(40, 1000)
    shapes = [x[:n] + n for n in (1, 40, 3, 33)]
    run = jax.jit(lambda arrays: [quantise_rows(a, implementation="triton") for a in arrays])
    for _ in range(5):
        for quantised, array in zip(run(shapes), shapes, strict=True):
            expected = quantise_rows(array, implementation="reference")
            np.testing.assert_array_equal(quantised.scales, expected.scales)


@pytest.mark.parametrize("program", [audit.main, soak.main, bench.main])
def test_programs_without_the_packages_say_so_in_one_line(monkeypatch, capsys, program):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert program([]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "pip install 'moe_jax[kernels]'" in said.err
    assert said.out == ""
