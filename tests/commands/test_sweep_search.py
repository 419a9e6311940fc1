"""Samplers, pruners, several objectives, scripts as experiments, and the dashboard of a sweep."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moe_jax.base.errors import UserError
from moe_jax.commands import sweep
from moe_jax.study.sweep import worker
from moe_jax.study.sweep.axes import Axis
from moe_jax.study.sweep.command import parse_sweep
from moe_jax.study.sweep.figures import height
from moe_jax.study.sweep.objectives import Objective, parse_objectives
from tests.commands.stand_in import FAKE, rows

pytest.importorskip("optuna")

TWO = "--objective validation_bits_per_byte --objective max:tokens_per_second"


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Runs a sweep over the stand-in in this process, with the folder tmp_path/out."""
    fake = tmp_path / "train.py"
    fake.write_text(FAKE)
    train = replace(sweep.EXPERIMENTS["train"], program=(str(fake),))
    monkeypatch.setitem(sweep.EXPERIMENTS, "train", train)
    monkeypatch.setattr(worker, "REPORT_SECONDS", 0.05)
    return lambda line: sweep.main(["train", "--out", str(tmp_path / "out"), *line.split()])


def test_a_grid_with_two_objectives_is_searched_whole_and_has_a_front(search, tmp_path, capsys):
    """Bits fall and speed falls with more experts, so the front has every number of experts at the
    best learning rate."""
    grid = "--search model.moe.experts=8,16,32 --search optim.learning-rate=1e-3,3e-3"
    search(f"{grid} --sampler grid {TWO}")
    said = capsys.readouterr().out
    out = tmp_path / "out"
    found = [(row["model.moe.experts"], row["optim.learning_rate"]) for row in rows(out)]
    # In the order of the grid, and all of it, although --trials is unset.
    assert found == [(e, r) for e in ("8", "16", "32") for r in ("1e-3", "3e-3")]
    assert [float(row["tokens_per_second"]) for row in rows(out)[::2]] == [125, 62.5, 31.25]
    result = json.loads((out / "result.json").read_text())
    front = result["config"]["front"]
    assert [point["params"]["model.moe.experts"] for point in front] == ["32", "16", "8"]
    assert {point["params"]["optim.learning_rate"] for point in front} == {"1e-3"}
    values = {m["name"]: m["value"] for m in result["measurements"]}
    assert values["best_tokens_per_second"] == 125
    assert values["best_validation_bits_per_byte"] == 1 / 32
    assert "3 of 6 trials are on the Pareto front" in said
    assert said.count("python experiments/train.py tiny --model.moe.experts") == 2  # 8 is tiny's
    plots = {path.stem for path in (out / "plots").glob("*.png")}
    assert plots == {"sweep", "history", "parallel", "importance", "pareto"}
    with pytest.raises(UserError, match="its study is to minimize and maximize, not to minimize"):
        search(f"{grid} --sampler grid")


def test_trials_that_are_behind_are_ended_early(search, tmp_path, capsys):
    """The median pruner judges from the sixth trial on. The first five are good ones."""
    rates = "1e-3,1.1e-3,1.2e-3,1.3e-3,1.4e-3,1e-4,1.05e-3"
    line = f"--search optim.learning-rate={rates} --sampler grid --pruner median --optim.decay 0.5"
    search(line)
    table = rows(tmp_path / "out")
    assert [row["state"] for row in table] == [*["complete"] * 5, "pruned", "complete"]
    assert table[5]["error"] == "ended early at step 10 with 1.125"
    assert "end" not in (tmp_path / "out" / "trial-0005" / "runs.txt").read_text()
    assert "1 more trials gave no value" in capsys.readouterr().out


SCRIPT = """
import json, sys
from dataclasses import dataclass
from pathlib import Path

@dataclass(frozen=True)
class Settings:
    out: str = ""
    seed: int = 0
    quick: bool = False
    width: int = 4

if __name__ == "__main__":
    options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    value = {"name": "seconds", "unit": "s", "value": int(options["--width"]) ** 2}
    Path(options["--out"], "result.json").write_text(json.dumps({"measurements": [value]}))
"""


def test_any_script_with_settings_is_an_experiment(tmp_path, capsys):
    script = tmp_path / "squares.py"
    script.write_text(SCRIPT)
    out = str(tmp_path / "out")
    words = [str(script), "--search", "width=int:2..5", "--sampler", "grid", "--out", out]
    sweep.main([*words, "--objective", "seconds", "--seed", "7"])
    said = capsys.readouterr().out
    assert rows(tmp_path / "out")[0]["seconds"] == "4.0"
    assert f"python {script} --seed 7 --width 2" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --search batch=4 --objective a --objective max:a", "--objective a is given twice"),
        ("train --search batch=4 --objective max:", "needs the name of a measurement"),
        (
            "train --search batch=4 --objective a --objective b --pruner median",
            "pruner=median compares one objective, and 2 are given",
        ),
        (
            "train --search optim.warmup=0..1 --sampler grid",
            "optim.warmup is a range of real numbers, which has no end of values",
        ),
        ("train --search batch=4 --sampler tp", "'tp' is not one of tpe, random, grid"),
        ("train --search batch=4 --storage mysql://host/a", "no address of a PostgreSQL database"),
        ("train --search batch=4 --storage file.db", "no address of a PostgreSQL database"),
        ("train --search batch=4 --storage postgresql://a:b@host/c", "put it into PGPASSWORD"),
        ("train --search batch=4 --study a", "--study needs --storage"),
        ("no_such.py --search batch=4", "or with the path of an experiment's script"),
    ],
)
def test_mistakes_are_one_line(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        sweep.main(line.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_script_without_settings_is_refused(tmp_path):
    script = tmp_path / "a.py"
    script.write_text("x = 1")
    with pytest.raises(UserError, match="has no class Settings"):
        sweep.main([str(script), "--search", "x=1,2"])
    script.write_text("1 / 0")
    with pytest.raises(UserError, match="division by zero"):
        sweep.main([str(script), "--search", "x=1,2"])


def test_objectives_have_a_direction():
    assert parse_objectives(("a", "max:b")) == (Objective("a"), Objective("b", maximise=True))


@pytest.mark.parametrize(
    ("axis", "value", "expected"),
    [
        (Axis("a", "", choices=("x", "y", "z")), "y", 0.5),
        (Axis("a", "", choices=("x",)), "x", 0.0),
        (Axis("a", "", low=2, high=6), 3, 0.25),
        (Axis("a", "", low=1e-4, high=1e-2, log=True), 1e-3, 0.5),
    ],
)
def test_heights_on_parallel_axes(axis, value, expected):
    assert height(axis, value) == pytest.approx(expected)


def test_a_password_is_kept_out_of_the_address_but_a_port_is_not():
    line = ["train", "--search", "batch=4,8", "--storage", "postgresql://me@host:5432/sweeps"]
    found = parse_sweep(line, sweep.find_experiment)
    assert found.config.database == "postgresql+psycopg://me@host:5432/sweeps"
    assert found.study == found.default_name
    assert parse_sweep([*line, "--study", "mine"], sweep.find_experiment).study == "mine"


def test_the_dashboard_is_given_the_storage_of_the_sweep(tmp_path, monkeypatch):
    served = []
    fake = SimpleNamespace(run_server=lambda storage, **_: served.append(storage))
    monkeypatch.setitem(sys.modules, "optuna_dashboard", fake)
    monkeypatch.setattr(sweep.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)  # pytest keeps its handlers
    sweep.main(["train", "--search", "batch=4,8", "--out", str(tmp_path), "--dashboard"])
    [study] = served[0].get_all_studies()
    assert study.study_name == "sweep"


def test_without_the_dashboard_package(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sweep.importlib.util, "find_spec", lambda name: None if "dashboard" in name else name
    )
    with pytest.raises(UserError, match="pip install optuna-dashboard"):
        sweep.main(["train", "--search", "batch=4,8", "--out", str(tmp_path), "--dashboard"])
