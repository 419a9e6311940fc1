"""The distillation experiment from its command line: a run that is stopped goes on."""

import json

import pytest

from experiments.distillation import run


@pytest.mark.slow
def test_a_quick_run_is_read_again(tmp_path, capsys):
    argv = ["--quick", "--out", str(tmp_path)]
    run.main(argv)
    first = json.loads((tmp_path / "result.json").read_text())
    (finished,) = (tmp_path / "arms").glob("*-kd-0.json")
    finished.unlink()
    capsys.readouterr()
    run.main(argv)
    printed = capsys.readouterr().out
    assert printed.count(" updates ") == 1  # the one that was missing
    assert (
        json.loads((tmp_path / "result.json").read_text())["measurements"]
        == (first["measurements"])
    )
