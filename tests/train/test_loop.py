import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from moe_jax.base import machine
from moe_jax.base.errors import UserError
from moe_jax.base.files import only_process
from moe_jax.config import CheckpointConfig, OptimConfig
from moe_jax.runs import run
from moe_jax.runs.load import load_run
from moe_jax.runs.run import run_training, what_is_kept
from moe_jax.train import loop
from moe_jax.train.loop import DivergedError
from moe_jax.train.metrics import read_lines
from moe_jax.train.task import Task
from moe_jax.train.text import prepare_data


def losses(config):
    return [(x["step"], x["loss"]) for x in read_lines(Path(config.out) / "metrics.jsonl")]


def measurements(config):
    result = json.loads((Path(config.out) / "result.json").read_text())
    return {m["name"]: m["value"] for m in result["measurements"]}


def test_a_run_leaves_everything_it_promises(finished_run):
    out = Path(finished_run.out)
    lines = list(read_lines(out / "metrics.jsonl"))
    assert [x["step"] for x in lines] == list(range(1, 13))
    assert {"loss", "gradient_norm", "learning_rate", "load_imbalance", "router_entropy"} <= set(
        lines[0]
    )
    assert all(x["dropped"] == 0 for x in lines)
    assert [x["step"] for x in lines if "validation_bits_per_byte" in x] == [6, 12]
    found = measurements(finished_run)
    for name in (
        "validation_bits_per_byte",
        "gzip_bits_per_byte",
        "xz_bits_per_byte",
        "ngram_bits_per_byte",
        "tokens_per_second",
        "gemm_fraction",
        "peak_resident_bytes",
        "compile_seconds",
        "training_seconds",
    ):
        assert found[name] > 0, name
    assert {p.name for p in (out / "plots").iterdir()} == {"loss.png", "load.png", "router.png"}
    assert "⟫" in (out / "samples.txt").read_text()


@pytest.mark.slow
def test_a_run_in_two_pieces_equals_one_in_one_piece(small_run, tmp_path):
    """The pieces are cut by an exception between two updates; real kills are in test_survival."""
    whole = replace(
        small_run,
        batch=8,
        optim=OptimConfig(accumulation=2),
        checkpoint=CheckpointConfig(every=5),
    )
    run_training(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))

    def stop_at_eight(_, line):
        if line["step"] == 8:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_check_finite", stop_at_eight)
        with pytest.raises(KeyboardInterrupt):
            run_training(cut)
    run_training(cut)
    assert losses(cut) == losses(whole)


def test_a_finished_run_is_reported_again_without_training(finished_run):
    before = losses(finished_run)
    (Path(finished_run.out) / "result.json").unlink()
    run_training(replace(finished_run, samples=0))
    assert losses(finished_run) == before
    assert measurements(finished_run)["validation_bits_per_byte"] > 0


def test_a_finished_run_says_so_without_compiling(finished_run, monkeypatch, capsys):
    monkeypatch.setattr(run, "train", None)
    result = json.loads((Path(finished_run.out) / "result.json").read_text())
    run_training(replace(finished_run, samples=result["config"]["samples"]))
    said = capsys.readouterr().out
    assert "is finished at step 12: " in said
    assert said.rstrip().endswith("--continue-to N trains it longer")


def test_what_a_stopped_run_keeps(finished_run, tmp_path):
    out = Path(finished_run.out)
    assert "there was no update yet: the same command begins anew" in what_is_kept(tmp_path, 12)
    assert what_is_kept(out, 99).startswith("step 12 of 99 is saved: the same command continues")
    assert "step 12, the last one, is saved: the same command writes" in what_is_kept(out, 12)


def test_processes_that_jax_alone_connects_are_refused_in_each(small_run, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"2 processes were started with jax\.distributed: g"):
        run_training(small_run)
    assert not Path(small_run.out).exists()


def test_another_setting_in_the_same_folder_is_refused(finished_run):
    with pytest.raises(UserError, match=r"holds a run with optim.learning_rate=0.003, not 0.1"):
        run_training(replace(finished_run, optim=OptimConfig(learning_rate=0.1)))


def test_copies_that_changed_sides_are_no_changed_text(small_run, tmp_path):
    """A run of the time when a copy of a text was split by its own name."""
    for index in range(8):
        source = tmp_path / "texts" / f"module{index}.py"
        (tmp_path / "texts" / f"copy{index}.py").write_text(source.read_text())
    task = Task(small_run)
    data = prepare_data(task, None)
    assert data.split_by_names != data.fingerprint
    saved: Any = {"tokenizer": data.tokenizer.to_json(), "data_stats": data.stats}
    saved["data_fingerprint"] = data.fingerprint
    assert prepare_data(task, saved).fingerprint == data.fingerprint
    saved["data_fingerprint"] = data.split_by_names
    with pytest.raises(
        UserError, match=r"holds the same text more than once\. This run began with"
    ):
        prepare_data(task, saved)
    saved["data_fingerprint"] = "another"
    with pytest.raises(UserError, match=r"has changed since this run began"):
        prepare_data(task, saved)


@pytest.mark.slow
def test_changed_text_is_refused(small_run, tmp_path):
    small_run = replace(small_run, steps=1)
    run_training(small_run)
    (tmp_path / "texts" / "module3.py").write_text("something else\n" * 30)
    with pytest.raises(UserError, match=r"has changed since this run began"):
        run_training(small_run)


def test_a_diverging_run_stops_with_its_last_good_checkpoint(small_run):
    optim = OptimConfig(learning_rate=1e30, warmup=0.0, clip_norm=0.0, max_skipped=3)
    config = replace(small_run, steps=40, optim=optim, evaluate_every=40)
    config = replace(config, checkpoint=CheckpointConfig(every=1))
    with pytest.raises(DivergedError, match=r"3 updates in a row were not finite"):
        run_training(config)
    lines = list(read_lines(Path(config.out) / "metrics.jsonl"))
    assert [line["skipped_in_a_row"] for line in lines[-3:]] == [1, 2, 3]
    assert [line["gradient_norm"] for line in lines[-3:]] == [None] * 3
    assert load_run(config.out).step == lines[-3]["step"] - 1


def test_two_processes_in_one_folder_are_refused(small_run):
    out = Path(small_run.out)
    out.mkdir()
    with only_process(out), pytest.raises(UserError, match="another process is training"):
        run_training(small_run)


def test_a_full_disk_is_refused_before_compiling(small_run, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"need 0.00 GB in .* 0.00 GB free: make room"):
        run_training(small_run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "/proc/nowhere"}, r"--out '/proc/nowhere' cannot be written"),
        ({"batch": 5}, r"batch=5 .* does not divide over 2 devices"),
    ],
)
def test_unusable_settings_are_refused_before_anything_else(small_run, change, message):
    with pytest.raises(UserError, match=message):
        run_training(replace(small_run, **change))


def test_a_model_that_cannot_fit_is_refused_with_the_sizes():
    from moe_jax.config.presets import PRESETS

    with pytest.raises(UserError, match=r"deepseek_v3 needs 8,.* GB"):
        run_training(PRESETS["deepseek_v3"])


def test_an_empty_corpus_is_refused(small_run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    data = replace(small_run.data, source=f"files:{empty}/*.txt")
    with pytest.raises(UserError, match="empty"):
        run_training(replace(small_run, data=data))
