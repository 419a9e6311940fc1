import re
import subprocess
import tomllib
from datetime import UTC, datetime

import pytest

import moe_jax
from moe_jax.base import provenance as module
from moe_jax.base.provenance import ROOT, commit, provenance


@pytest.fixture(autouse=True)
def forget_commit():
    commit.cache_clear()
    yield
    commit.cache_clear()


def make_repository(folder):
    (folder / "file").write_text("one")
    settings = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "file"], [*settings, "commit", "-qm", "m"]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    head = ["git", "-C", folder, "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()


def test_the_package_has_a_version_and_the_build_reads_it_there():
    assert re.fullmatch(r"\d+\.\d+\.\d+", moe_jax.__version__)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["dynamic"] == ["version"]
    assert ROOT / settings["tool"]["hatch"]["version"]["path"] == ROOT / "moe_jax/__init__.py"


def test_commit_of_a_checkout_and_whether_it_was_changed(tmp_path, monkeypatch):
    head = make_repository(tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    assert commit() == head
    (tmp_path / "file").write_text("two")
    assert commit() == head, "the first answer is kept while the program runs"
    commit.cache_clear()
    assert commit() == f"{head}-dirty"


def test_no_commit_without_a_checkout_of_its_own(tmp_path, monkeypatch):
    make_repository(tmp_path)
    installed = tmp_path / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(module, "ROOT", installed)
    assert commit() is None
    commit.cache_clear()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")  # no git
    assert commit() is None


def test_command_date_and_duration(monkeypatch):
    monkeypatch.setattr("sys.argv", ["experiments/train.py", "--out", "a b"])
    found = provenance()
    assert found["command"] == "python experiments/train.py --out 'a b'"
    written = datetime.fromisoformat(found["date"])
    assert abs((datetime.now(UTC) - written).total_seconds()) < 5
    assert found["duration_seconds"] > 0
    assert set(found) == {"version", "commit", "command", "date", "duration_seconds"}
