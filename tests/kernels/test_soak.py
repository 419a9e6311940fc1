"""The soak finds what is wrong, makes it small, and says how to see it again."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "kernels"))
import soak

pytest.importorskip("triton")
CASE = soak.Case(5, 2, 1, 2, 1, "float32", "zipf", True, 7)


@pytest.fixture
def broken(monkeypatch):
    """Kernels that are wrong for four tokens and more, in one number."""
    right = soak.run_kernels

    def run(inputs):
        found = right(inputs)
        if len(found["out"]) >= 4:
            found["out"] = np.copy(found["out"])
            found["out"][3, 0] += 1.0
        return found

    monkeypatch.setattr(soak, "run_kernels", run)


def test_a_case_survives_being_written():
    assert soak.parse_case(str(CASE)) == CASE


@pytest.mark.parametrize("dtype", soak.DTYPES)
def test_the_oracle_and_the_kernels_agree(dtype):
    case = soak.Case(9, 12, 7, 4, 2, dtype, "few", True, 3)
    assert soak.attempt(case) is None


@pytest.mark.slow
def test_a_fault_is_shrunk_to_the_least_case(broken, capsys):
    assert soak.attempt(CASE).startswith("out: largest error")
    small = soak.shrink(CASE)
    assert (small.tokens, small.width, small.hidden, small.per_token) == (4, 1, 1, 1)
    assert soak.main(["--case", str(small)]) == 1
    assert "out: largest error" in capsys.readouterr().out


def test_failures_are_counted_and_written(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "draw_case", lambda *_: CASE)
    monkeypatch.setattr(soak, "shrink", lambda case: case)
    file = tmp_path / "soak.json"
    assert soak.main(["--minutes", "0.001", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert found["cases"] == found["failures"] == 1
    assert found["found"][0]["reproduction"] == f'python kernels/soak.py --case "{CASE}"'


def test_drawn_cases_differ_and_can_be_made():
    random = np.random.default_rng(0)
    cases = {soak.draw_case(random, 160) for _ in range(50)}
    assert len(cases) == 50
    assert {case.dtype for case in cases} == set(soak.DTYPES)
    assert {case.skew for case in cases} == set(soak.SKEWS)
    assert all(soak.make_inputs(case).experts.max() <= case.experts for case in list(cases)[:5])


@pytest.mark.parametrize("text", ["tokens=3", f"{CASE} dtype=int8", str(CASE).replace("zipf", "?")])
def test_a_case_that_cannot_be_is_refused_in_a_line(text, capsys):
    assert soak.main(["--case", text]) == 2
    assert re.match(r"--case[: ]", capsys.readouterr().err)
