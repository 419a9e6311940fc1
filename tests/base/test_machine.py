import subprocess
import sys

import pytest

from moe_jax.base import machine
from moe_jax.base.errors import UserError


def test_gemm_rate_is_plausible():
    assert 1e8 < machine.gemm_rate("float32", size=256, repeats=3) < 1e16


def test_the_better_gemm_is_the_limit_and_a_moving_one_is_noticed():
    quiet = machine.GemmRates(before=100.0, after=105.0)
    assert (quiet.best, quiet.moved) == (105.0, False)
    busy = machine.GemmRates(before=34.0, after=104.0)
    assert (busy.best, busy.moved) == (104.0, True)


def test_memory_is_refused_only_when_it_is_not_there(monkeypatch):
    monkeypatch.setattr(machine, "available_bytes", lambda: 10**9)
    machine.require_memory("small", 10**9)
    with pytest.raises(UserError, match=r"big needs 2.0 GB .* has 1.0 GB"):
        machine.require_memory("big", 2 * 10**9)
    monkeypatch.setattr(machine, "available_bytes", lambda: None)
    machine.require_memory("unknown", 10**18)


def test_peak_memory_is_in_bytes():
    assert 50e6 < machine.peak_resident_bytes() < 100e9


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")
def test_a_program_restarts_once_for_huge_pages_and_keeps_its_arguments():
    code = (
        "import os, sys; from moe_jax.base.startup import ask_for_huge_pages; ask_for_huge_pages();"
        "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "a b", "--c"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "glibc.malloc.hugetlb=1 ['a b', '--c']\n"


def test_programs_may_be_for_a_gpu_that_is_absent():
    assert machine.compute_capability() is None
    with machine.compiling_for(9.0):
        assert machine.compute_capability() == 9.0
    assert machine.compute_capability() is None
