"""Losses, gradients, statistics and updates of every layout equal those of one device."""

import os
import re
import subprocess
import sys

import pytest

from tests.parallel.layouts import CASES, IN_PLACE, LAYOUTS

TOLERANCE = 1e-10
"""Of float64, relative to an array's largest value. Sums are taken in another order."""


def differences(pairs: list[str]) -> dict[str, float]:
    """tests.parallel.layouts in a process with eight devices."""
    number = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "JAX_ENABLE_X64": "1"}
    command = [sys.executable, "-m", "tests.parallel.layouts", *pairs]
    done = subprocess.run(
        command, env=os.environ | number, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {pair: float(value) for pair, value in re.findall(r"^(\S+) (\S+)$", done.stdout, re.M)}


def check(pairs: list[str]) -> None:
    found = differences(pairs)
    assert list(found) == pairs
    wrong = {pair: value for pair, value in found.items() if not value < TOLERANCE}
    assert not wrong, wrong


def test_three_axes_equal_one_device():
    check(["gqa/three"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gqa", "mla", "dense"])
def test_every_layout_equals_one_device(case):
    # Replicas need experts.
    check([f"{case}/{one}" for one in LAYOUTS if case != "dense" or "replicas" not in one])


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(IN_PLACE))
def test_experts_read_in_place_equal_one_device(case):
    check([f"{case}/{layout}" for layout in ("data-chunks", "data-overflow", "fsdp-expert")])


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(CASES.keys() - IN_PLACE.keys() - {"gqa", "mla", "dense"}))
def test_everything_that_a_model_may_have_equals_one_device(case):
    # Micro-batches of the accumulation have four rows.
    others = "expert-tensor" if case == "accumulation" else "fsdp-expert"
    layouts = [others, "three", "replicas-three"]
    check([f"{case}/{layout}" for layout in layouts])
