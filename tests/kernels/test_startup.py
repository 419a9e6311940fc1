"""What users see in front of everything on a machine without a GPU, where the tests hide it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from moe_kernels.startup import SKIP_CHECK, quiet_without_gpu

HIDDEN_BY_THE_TESTS = ("JAX_PLATFORMS", "XLA_FLAGS", "TRITON_INTERPRET", SKIP_CHECK)


def errors_of(code: str) -> str:
    """What a new process prints to stderr in a user's environment, which is not the tests'."""
    environment = {k: v for k, v in os.environ.items() if k not in HIDDEN_BY_THE_TESTS}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
@pytest.mark.parametrize("package", ["moe_jax.base.machine", "moe_kernels.launch"])
def test_nothing_is_said_about_a_gpu_that_is_not_there(package):
    # JAX may be imported before us: it looks for its plugins when a device is asked for.
    code = f"import jax, {package}; assert jax.default_backend() == 'cpu'"
    assert errors_of(code) == ""


@pytest.mark.parametrize("device", ["nvidia0", "nvidia7", "nvidiactl", "dxg"])
def test_a_gpu_that_may_be_there_is_checked_as_ever(tmp_path, monkeypatch, device):
    monkeypatch.setattr(os, "environ", {})
    (tmp_path / device).touch()
    quiet_without_gpu(tmp_path)
    assert os.environ == {}


def test_without_a_gpu_only_the_check_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    quiet_without_gpu(tmp_path)
    assert os.environ == {SKIP_CHECK: "1"}
