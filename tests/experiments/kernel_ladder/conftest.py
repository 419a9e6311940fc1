"""What the tests of the ladder share."""

import pytest


@pytest.fixture
def without_compiler(monkeypatch):
    """The audit's answer for every kernel, without Triton's compiler."""
    from moe_kernels.audit import compile as audit

    row = {
        "registers": 170, "spill_bytes": 0, "shared_bytes": 147456, "cp_async": 36,
        "special": 129, "occupancy": 0.125, "config": "bf16",
    }  # fmt: skip
    monkeypatch.setattr(audit, "compile_launch", lambda launch, arch: dict(row))
