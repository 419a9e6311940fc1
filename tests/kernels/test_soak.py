"""The soak finds what is wrong, makes it small, and says how to see it again."""

import json
import re
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from moe_kernels.schedule import reference
from moe_kernels.soak import __main__ as command
from moe_kernels.soak import check, search
from moe_kernels.soak.case import DTYPES, SKEWS, Case, draw_case, make_inputs, parse_case
from moe_kernels.soak.oracle import schedule_oracle

pytest.importorskip("triton")
CASE = Case(
    tokens=5,
    width=2,
    hidden=1,
    experts=2,
    per_token=1,
    dtype="float32",
    skew="zipf",
    unassigned=True,
    seed=7,
)


@pytest.fixture
def broken(monkeypatch):
    """Kernels that are wrong for four tokens and more, in one number."""
    right = check.run_kernels

    def run(inputs):
        results = right(inputs)
        if len(results["out"]) >= 4:
            results["out"] = np.copy(results["out"])
            results["out"][3, 0] += 1.0
        return results

    monkeypatch.setattr(check, "run_kernels", run)


def test_a_case_survives_being_written():
    assert parse_case(str(CASE)) == CASE


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_oracle_and_the_kernels_agree(dtype):
    case = replace(CASE, tokens=9, width=12, hidden=7, experts=4, per_token=2, dtype=dtype)
    assert check.attempt(replace(case, skew="few", seed=3)) is None


def test_the_oracle_of_the_schedule_is_the_reference():
    experts = np.random.default_rng(0).integers(0, 6, (40, 3))  # 5 experts, and some without one
    arrays = schedule_oracle(experts, 5, 16, 12)
    expected = reference.schedule(jnp.asarray(experts), 5, 16, 12)
    names = ("load", "counts", "starts", "assignment", "row", "block_expert")
    for name, array in zip(names, expected, strict=True):
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


@pytest.mark.slow
def test_a_fault_is_shrunk_to_the_least_case(broken, capsys):
    assert check.attempt(CASE).startswith("out: largest error")
    small = search.shrink(CASE)
    assert (small.tokens, small.width, small.hidden, small.per_token) == (4, 1, 1, 1)
    assert command.main(["--case", str(small)]) == 1
    assert "out: largest error" in capsys.readouterr().out


def test_failures_are_counted_and_written(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "draw_case", lambda *_: CASE)
    monkeypatch.setattr(search, "shrink", lambda case: case)
    file = tmp_path / "soak.json"
    assert command.main(["--minutes", "0.001", "--json", str(file)]) == 1
    written = json.loads(file.read_text())
    assert written["cases"] == written["failures"] == 1
    command_line = f'python -m moe_kernels.soak --case "{CASE}"'
    assert written["details"][0]["reproduction"] == command_line


def test_drawn_cases_differ_and_can_be_made():
    random = np.random.default_rng(0)
    cases = {draw_case(random, 160) for _ in range(50)}
    assert len(cases) == 50
    assert {case.dtype for case in cases} == set(DTYPES)
    assert {case.skew for case in cases} == set(SKEWS)
    assert all(make_inputs(case).experts.max() <= case.experts for case in list(cases)[:5])


@pytest.mark.parametrize("text", ["tokens=3", f"{CASE} dtype=int8", str(CASE).replace("zipf", "?")])
def test_a_case_that_cannot_be_is_refused_in_a_line(text, capsys):
    assert command.main(["--case", text]) == 2
    assert re.match(r"--case[: ]", capsys.readouterr().err)
