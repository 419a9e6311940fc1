import importlib

import pytest

from moe_jax.__main__ import COMMANDS, dispatch
from moe_jax.base import provenance
from moe_jax.base.errors import UserError
from tests.repository.sources import ROOT


def test_every_command_has_a_body_and_a_script():
    for name in COMMANDS:
        stem = name.replace("-", "_")
        assert callable(importlib.import_module(f"moe_jax.commands.{stem}").main)
        assert f'run("{name}")' in (ROOT / "experiments" / f"{stem}.py").read_text()


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_without_a_command_it_lists_them(words, capsys):
    dispatch(words)
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in COMMANDS)


def test_version(capsys):
    dispatch(["--version"])
    assert capsys.readouterr().out.startswith("moe_jax ")


def test_a_command_gets_its_arguments():
    with pytest.raises(UserError, match="unknown option --steks: did you mean --steps"):
        dispatch(["train", "--steks", "4"])


def test_an_unknown_command_is_one_line():
    with pytest.raises(UserError, match=r"unknown command 'trian': .*\(did you mean train\?\)"):
        dispatch(["trian"])


def test_the_call_of_a_command_is_the_one_that_works_here(monkeypatch, tmp_path):
    assert provenance.call_of("teacher-text") == "python experiments/teacher_text.py"
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.call_of("teacher-text") == "moe-jax teacher-text"


@pytest.mark.parametrize("program", ["/env/bin/moe-jax", "/env/moe_jax/__main__.py"])
def test_the_recorded_command_is_the_console_command(program, monkeypatch):
    monkeypatch.setattr("sys.argv", [program, "train", "--steps", "4"])
    assert provenance.provenance()["command"] == "moe-jax train --steps 4"
