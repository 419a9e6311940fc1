"""The sweep with a stand-in for experiments/train.py that takes milliseconds."""

import importlib.util
import json
import os
import signal
import time

import pytest

from moe_jax.base.errors import UserError
from moe_jax.commands import sweep
from moe_jax.config import TrainConfig
from moe_jax.study.sweep.axes import parse_axis
from moe_jax.study.sweep.command import parse_sweep
from tests.commands.stand_in import finish, rows, start_sweep

pytest.importorskip("optuna")

SEARCH = "--search model.moe.experts=1,8,16 --search optim.learning-rate=log:1e-4..1e-2"


@pytest.fixture
def start(tmp_path):
    """Starts a sweep whose folder is tmp_path/out."""
    return lambda line: start_sweep(tmp_path, line)


def test_a_sweep_and_its_continuation(start, tmp_path):
    out = tmp_path / "out"
    finish(start(f"{SEARCH} --trials 4 --steps 9"))
    before = rows(out)
    assert [row["folder"] for row in before] == [f"trial-000{n}" for n in range(4)]
    said = finish(start(f"{SEARCH} --trials 10 --steps 9"))
    after = rows(out)
    assert after[:4] == before
    assert len(after) == 10
    assert len({row["optim.learning_rate"] for row in after}) == 10  # no draw is repeated

    best = min((r for r in after if r["state"] == "complete"), key=value)
    found = f"--model.moe.experts {best['model.moe.experts']} "
    found += f"--optim.learning-rate {best['optim.learning_rate']}"
    tiny = "--model.moe.experts 8 "  # the preset's own, which the command leaves out
    assert f"train.py tiny --steps 9 {found.removeprefix(tiny)}\n" in said
    report = json.loads((out / "result.json").read_text())
    assert report["measurements"][0]["value"] == value(best)
    assert report["measurements"][0]["unit"] == "bits"
    assert report["environment"] == {"device": "H100"}
    assert (out / "plots" / "sweep.png").stat().st_size > 0
    for row in after:
        if row["model.moe.experts"] == "1":
            assert (row["state"], row["error"]) == ("pruned", "K=2 exceeds experts=1")
        elif float(row["optim.learning_rate"]) > 5e-3:
            assert (row["state"], row["error"]) == ("fail", "RuntimeError: out of memory")
        else:
            assert row["state"] == "complete"


def value(row: dict[str, str]) -> float:
    return float(row["validation_bits_per_byte"])


@pytest.mark.slow
def test_the_seed_decides_the_trials(start, tmp_path):
    finish(start(f"{SEARCH} --trials 2 --seed 5"))
    first = rows(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "before")
    finish(start(f"{SEARCH} --trials 2 --seed 5"))
    same = ("model.moe.experts", "optim.learning_rate", "state")
    assert [[r[k] for k in same] for r in rows(tmp_path / "out")] == [
        [r[k] for k in same] for r in first
    ]
    assert "--seed 5" in (tmp_path / "out" / "trial-0000" / "runs.txt").read_text()


def test_killed_in_the_middle_of_a_trial(start, tmp_path):
    out = tmp_path / "out"
    line = "--search model.moe.experts=8,16 --search batch=int:4..64 --trials 3 --optim.decay 0.6"
    worker = start(line)
    runs = out / "trial-0001" / "runs.txt"
    while not (runs.exists() and "start" in runs.read_text()):
        assert worker.poll() is None, worker.communicate()
        time.sleep(0.02)
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    finish(start(line))

    # The orphaned run kept its folder until it ended; then the trial ran again, with its settings.
    first, end, again, last = runs.read_text().splitlines()
    assert (first, end, last) == (again, "end", "end")
    # Folders carry Optuna's numbers, and the second attempt at the killed trial may use one up.
    folders = sorted(row["folder"] for row in rows(out))
    assert folders[:2] == ["trial-0000", "trial-0001"]
    assert folders[2] in ("trial-0002", "trial-0003")
    assert len(folders) == 3
    assert all(row["state"] == "complete" for row in rows(out))


def test_a_stopped_worker_waits_for_its_run_and_the_trial_goes_on(start, tmp_path):
    line = "--search batch=4,8 --trials 1 --optim.decay 1"
    worker = start(line)
    runs = tmp_path / "out" / "trial-0000" / "runs.txt"
    while not (runs.exists() and "start" in runs.read_text()):
        assert worker.poll() is None, worker.communicate()
        time.sleep(0.02)
    os.kill(worker.pid, signal.SIGTERM)
    said = finish(worker, code=143)
    assert "out is kept, the next start continues trial-0000" in said
    assert "end" not in runs.read_text()  # the stand-in has no handler, and ends by the signal
    finish(start(line))
    assert [(row["folder"], row["state"]) for row in rows(tmp_path / "out")] == [
        ("trial-0000", "complete")
    ]


def test_workers_share_the_trials(start, tmp_path):
    line = f"{SEARCH} --trials 6 --optim.decay 0.2"
    for worker in [start(line), start(line)]:
        finish(worker)
    folders = [row["folder"] for row in rows(tmp_path / "out")]
    assert len(folders) == len(set(folders)) == 6


@pytest.mark.slow
def test_another_search_needs_another_folder(start):
    finish(start("--search batch=4,8 --trials 1"))
    said = finish(start("--search batch=4,8,16 --trials 1"), code=2)
    assert "holds a sweep with search batch=4,8, not batch=4,8,16: use another --out" in said
    assert said.count("\n") == 1


def test_fields_that_depend_on_each_other_are_searched_together(start, tmp_path):
    search = "model.moe.gate+model.moe.bias-rate=softmax+0,sigmoid+0.001"
    said = finish(start(f"--search {search} --trials 20"))
    assert "the search has 2 combinations" in said
    found = {(row["model.moe.gate"], row["model.moe.bias_rate"]) for row in rows(tmp_path / "out")}
    assert found == {("softmax", "0"), ("sigmoid", "0.001")}
    options = (tmp_path / "out" / "trial-0000" / "runs.txt").read_text()
    assert "--model.moe.gate " in options
    assert "--model.moe.bias-rate " in options
    assert "train.py tiny" in said


@pytest.mark.slow
def test_an_exhausted_grid_ends_and_nothing_runs_twice(start, tmp_path):
    line = "--search model.moe.experts=1,8,16 --search steps=int:5..8"
    finish(start(f"{line} --trials 5"))
    assert len(rows(tmp_path / "out")) == 5
    finish(start(f"{line} --trials 40"))
    found = [(row["model.moe.experts"], row["steps"]) for row in rows(tmp_path / "out")]
    assert len(found) == len(set(found)) == 12
    finish(start(f"{line} --trials 41"))
    assert len(rows(tmp_path / "out")) == 12


def test_when_no_trial_gives_a_value(start):
    said = finish(start("--search model.moe.experts=1 --search batch=4,8 --trials 2"), code=2)
    assert said.endswith(
        "error: none of the 2 trials gave a value; the first: K=2 exceeds experts=1\n"
    )
    assert "Traceback" not in said


def test_an_objective_that_is_not_measured_stops_the_sweep(start, tmp_path):
    said = finish(start("--search batch=4,8 --trials 5 --objective loss"), code=2)
    assert "error: --objective 'loss' is not measured: use one of validation_bits_per_byte" in said
    assert not (tmp_path / "out" / "trial-0001").exists()


def test_a_diverged_trial_has_no_value(start):
    said = finish(start("--search batch=4 --trials 1 --samples 1"), code=2)
    assert "the first: validation_bits_per_byte is nan" in said


@pytest.mark.parametrize(
    ("text", "choices", "low", "high", "log"),
    [
        ("model.moe.experts=8,16,8", ("8", "16"), 0, 0, False),
        ("model.tied-embedding=true,false", ("true", "false"), 0, 0, False),
        ("model.vocabulary=int:5000..6000", (), 5000, 6000, False),
        ("model.width=log:64..1024", (), 64, 1024, True),
        ("optim.learning-rate=log:1e-4..1e-2", (), 1e-4, 1e-2, True),
        ("optim.warmup=0..0.5", (), 0.0, 0.5, False),
        ("data.source=files:a/../b,stdlib", ("files:a/../b", "stdlib"), 0, 0, False),
    ],
)
def test_search_spaces(text, choices, low, high, log):
    axis = parse_axis(text, TrainConfig())
    assert (axis.choices, axis.low, axis.high, axis.log) == (choices, low, high, log)
    assert axis.distribution() is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "unknown experiment '': start with one of train"),
        ("tran", "unknown experiment 'tran'"),
        ("train", "nothing to search: add --search"),
        ("train --search batch", "--search 'batch': write FIELD=A,B"),
        ("train --search =4", "--search '=4': write FIELD=A,B"),
        ("train --search model.moe.expert=4", "did you mean --model.moe.experts?"),
        ("train --search batch=4,x", "--batch: 'x' is not an int"),
        ("train --search batch=4,,8", "--batch: '' is not an int"),
        ("train --search batch=4..8", "batch is an int, so write int:4..8"),
        ("train --search batch=int:8..4", "8 is not below 4"),
        ("train --search batch=int:4", "write a range as A..B, int:A..B or log:A..B"),
        ("train --search batch=lin:4..8", "write a range as A..B, int:A..B or log:A..B"),
        ("train --search batch=int:4..x", "'4..x' is not a pair of ints"),
        ("train --search optim.warmup=a..b", "'a..b' is not a pair of floats"),
        ("train --search optim.warmup=0..nan", "0.0 is not below nan"),
        ("train --search optim.learning-rate=log:0..1", "a log range starts above 0, not at 0.0"),
        ("train --search optim.schedule=cosine,cos", "'cos' is not one of cosine, wsd"),
        ("train --search model.tied-embedding=yes", "'yes' is not true or false"),
        ("train --search out=a,b", "the sweep gives every trial its own out folder"),
        ("train --search batch=4 --search batch=8", "--search batch is given twice"),
        ("train --search batch+batch=4+8", "a field is named twice"),
        ("train --search batch=4 --search batch+steps=4+9", "--search batch is given twice"),
        ("train --search batch+steps=4+9,8", "'8' has 1 values for 2 fields: join them by +"),
        ("train --search batch+stepz=4+9", "did you mean --steps?"),
        ("train --search batch+steps=4+x", "--steps: 'x' is not an int"),
        ("train --search batch+out=4+x", "the sweep gives every trial its own out folder"),
        ("train --search batch=4 --out /dev/null/x", "--out '/dev/null/x' cannot be used: "),
        ("train --search batch=4 --trials 0", "trials is 0: it must be positive"),
        ("train --search batch=4 --preset tinny", "did you mean tiny?"),
        ("train --search batch=4 --trails 3", "unknown option --trails: did you mean --trials?"),
        ("train --search batch=4 --steps x", "--steps: 'x' is not an int"),
    ],
)
def test_mistakes_are_one_line_before_any_trial(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        sweep.main(line.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_quick_is_three_short_trials():
    line = ["train", "--search", "batch=4,8,16,32", "--quick"]
    quick = parse_sweep(line, sweep.find_experiment)
    assert (quick.trials, quick.arguments[1:3]) == (3, ("--steps", "20"))
    assert parse_sweep([*line, "--steps", "5"], sweep.find_experiment).arguments[1:3] == (
        "--steps",
        "5",
    )


@pytest.mark.parametrize(
    "words",
    [["--search", "batch=4,8", "--processes.count", "2"], ["--search", "processes.timeout=3,4"]],
)
def test_trials_are_single_processes(words):
    with pytest.raises(UserError, match="each trial of a sweep is one process"):
        parse_sweep(["train", *words], sweep.find_experiment)


def test_without_optuna(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'moe_jax\[sweep\]'"):
        sweep.main(["train", "--search", "batch=4,8"])
