import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import TrainConfig
from moe_jax.runs.run import run_training
from moe_jax.train.logs import NoLog, check_log, open_log, scalars
from moe_jax.train.metrics import read_lines

LINE = {
    "step": 3,
    "loss": 2.5,
    "held_out": None,
    "router_entropy": [0.5, 0.25],
    "load": [[1, 2], [3, 4]],
    "finite": True,
}


def test_numbers_and_layers_are_logged_and_tables_are_not():
    assert dict(scalars(LINE)) == {
        "step": 3.0,
        "loss": 2.5,
        "router_entropy/layer_0": 0.5,
        "router_entropy/layer_1": 0.25,
    }


@pytest.mark.parametrize(("kind", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_log_without_its_package_is_one_line(kind, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"--log {kind} needs {package}.*: pip install {package}$"):
        check_log(TrainConfig(log=kind))
    check_log(TrainConfig())


def test_event_files_of_a_resumed_run_hide_what_is_done_again(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *words):
            calls.append(words)

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
    log = open_log(TrainConfig(log="tensorboard"), tmp_path, 2)
    log.write(LINE)
    log.close()
    assert calls == [
        (str(tmp_path / "tensorboard"), 3),
        ("loss", 2.5, 3),
        ("router_entropy/layer_0", 0.5, 3),
        ("router_entropy/layer_1", 0.25, 3),
        "closed",
    ]


def test_without_a_log_nothing_is_written(tmp_path):
    assert isinstance(open_log(TrainConfig(), tmp_path, 0), NoLog)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tensorboard_reads_every_loss_of_a_run(small_run):
    pytest.importorskip("tensorboardX")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = run_training(replace(small_run, log="tensorboard"))
    read = events.EventAccumulator(str(out / "tensorboard"))
    read.Reload()
    logged = {event.step: event.value for event in read.Scalars("loss")}
    losses = {line["step"]: line["loss"] for line in read_lines(out / "metrics.jsonl")}
    assert logged == pytest.approx(losses)
    assert len(losses) == 12


@pytest.mark.slow
def test_wandb_logs_offline_where_nobody_is_logged_in(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key would be
    log = open_log(TrainConfig(log="wandb"), tmp_path, 0)
    log.write(LINE)
    log.close()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
