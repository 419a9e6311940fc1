"""Checkpoints of a tiny state: saved, damaged in every file, unreadable, of another version."""

import errno
import json
import math
import os
import resource
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.base import files
from moe_jax.base.errors import UserError
from moe_jax.base.scratch import MARKER
from moe_jax.config import CheckpointConfig, TrainConfig
from moe_jax.train.checkpoint import FORMAT, MANIFEST, Checkpoints, arrays, checkpoints, manifest
from moe_jax.train.checkpoint.folder import METRICS, set_aside
from moe_jax.train.checkpoint.manifest import manifest_fault, write_manifest

STATE = {
    "weights": jnp.arange(5000, dtype=jnp.float32),
    "half": jnp.ones((3, 4), jnp.bfloat16),
    "step": jnp.asarray(3),
}
EXTRA = {
    "config": asdict(TrainConfig()),
    "tokenizer": "é",
    "data_fingerprint": "0",
    "data_stats": {},
    "data_state": {},
}


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(files, "RETRY_SECONDS", (0.01, 0.01, 0.01))


def open_checkpoints(path, keep=2):
    return Checkpoints(path, CheckpointConfig(keep=keep))


def shapes(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def save_steps(path, steps, bits=None, keep=2, extra=None):
    saved = open_checkpoints(path, keep)
    for step in steps:
        scaled = jax.tree.map(lambda leaf, s=step: leaf * s, STATE)
        saved.save(step, scaled, {**EXTRA, "at": step, **(extra or {})}, (bits or {}).get(step))
    saved.close()


def restore(path, like=None, *, read_only=False):
    said = []
    saved = Checkpoints(path, CheckpointConfig(), read_only=read_only)
    try:
        return saved.restore(like or shapes(STATE), said.append), said
    finally:
        saved.close()


def kept_steps(path):
    return sorted(int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit())


def names(path):
    return {p.name for p in (path / "checkpoints").iterdir()} - {"unfinished"}


def contents(folder):
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_round_trip(tmp_path):
    save_steps(tmp_path, [7])
    found, said = restore(tmp_path)
    assert (found.step, said) == (7, [])
    assert found.extra == {**EXTRA, "at": 7, "format": FORMAT}
    np.testing.assert_array_equal(found.state["weights"], 7 * np.arange(5000))


def test_nothing_saved_yet(tmp_path):
    assert restore(tmp_path) == (None, [])


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4, 5], bits={1: 3.0, 2: 1.5, 4: 2.0, 5: math.nan})
    assert kept_steps(tmp_path) == [2, 4, 5]
    save_steps(tmp_path, [6, 7], bits={6: 1.7})  # in another process, as it were
    assert kept_steps(tmp_path) == [2, 6, 7]
    save_steps(tmp_path, [8, 9, 10], bits={8: 1.2})
    assert kept_steps(tmp_path) == [8, 9, 10]


def test_only_checkpoints_that_can_be_read_and_hold_nothing_else_give_way(tmp_path):
    save_steps(tmp_path, [1, 2, 3], bits={1: 2.0, 2: 3.0, 3: 4.0}, keep=9)
    folder = tmp_path / "checkpoints"
    (folder / "2" / "notes.txt").write_text("the user's")
    (folder / "3" / METRICS).write_text("{")
    (folder / "07").mkdir()
    (folder / "mine").mkdir()
    save_steps(tmp_path, [4, 5, 6])
    # 1 is the best, 2 has the user's file, the metric of 3 cannot be read.
    assert names(tmp_path) == {"1", "2", "3", "5", "6", "07", "mine"}


def test_reading_leaves_a_save_under_way_alone(tmp_path):
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints"
    (folder / "2" / MANIFEST).unlink()
    (folder / "unfinished" / "3").mkdir()
    assert restore(tmp_path, read_only=True)[0].step == 1
    assert names(tmp_path) == {"1", "2"}
    assert (folder / "unfinished" / "3").is_dir()


def test_the_leftovers_of_a_killed_save_go_when_the_run_goes_on_and_only_ours(tmp_path):
    save_steps(tmp_path, [1])
    unfinished = tmp_path / "checkpoints" / "unfinished"
    (unfinished / "2" / "state").mkdir(parents=True)
    saved = open_checkpoints(tmp_path)
    saved.peek(print)  # the command may still be refused
    assert (unfinished / "2").is_dir()
    saved.restore(shapes(STATE), print)
    assert [p.name for p in unfinished.iterdir()] == [MARKER]
    saved.close()
    (unfinished / MARKER).unlink()
    (unfinished / "thesis.txt").write_text("the user's")
    with pytest.raises(UserError, match="holds files that moe_jax did not make"):
        restore(tmp_path)
    assert (unfinished / "thesis.txt").read_text() == "the user's"


# Damage


def files_of_a_checkpoint():
    """Names of all files of a checkpoint of STATE. The sharding file exists for each process."""
    state = ["_METADATA", "_CHECKPOINT_METADATA", "_sharding", "array_metadatas/process_0"]
    state += [f"{name}/{part}" for name in ("weights", "half", "step") for part in (".zarray",)]
    return [
        *(f"state/{name}" for name in [*state, "weights/0", "half/0.0", "step/0"]),
        *("extra/metadata", "metrics/metrics", MANIFEST),
    ]


def flip_a_high_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 128
    path.write_bytes(data)


DAMAGE = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one high bit flipped": flip_a_high_bit,
    "gone": Path.unlink,
    "a folder": lambda path: [path.unlink(), path.mkdir()],
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with the steps 1 and 2. Tests copy it."""
    path = tmp_path_factory.mktemp("steps")
    save_steps(path, [1, 2], bits={1: 2.0, 2: 1.0})
    return path


@pytest.fixture
def two(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


def test_every_file_of_a_checkpoint_is_damaged_below(two_steps):
    folder = two_steps / "checkpoints" / "2"
    found = contents(folder).keys() - {"state/commit_success.txt"}
    assert found == set(files_of_a_checkpoint())


@pytest.mark.parametrize("name", files_of_a_checkpoint())
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(two, name):
    folder = two / "checkpoints"
    whole = contents(folder / "2")
    for number, damage in enumerate(DAMAGE):
        DAMAGE[damage](folder / "2" / name)
        damaged = contents(folder / "2")
        found, said = restore(two)
        assert (found.step, found.extra["at"], len(said)) == (1, 1, 1)
        assert said[0].startswith("checkpoint 2 is damaged (")
        assert name in said[0] or name == MANIFEST
        assert said[0].endswith("set aside as damaged-2")
        aside = folder / f"damaged-2{f'-{number + 1}' if number else ''}"
        assert contents(aside) == damaged  # nothing is deleted
        shutil.copytree(aside, folder / "2")
        shutil.rmtree(folder / "2")
        for path, content in whole.items():
            (folder / "2" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "2" / path).write_bytes(content)


MANIFESTS = {
    "no JSON": b"\x80{",
    "a list": b"[]",
    "empty": b"{}",
    "a list for each file": b'{"extra/metadata": [1]}',
    "text for a size": b'{"extra/metadata": ["1", "2"]}',
    "a number for an entry": b'{"extra/metadata": 3}',
    "nested": b"[" * 100_000,
    "a strange name": b'{"a\\u0000b": [1, "2"]}',
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_of_another_shape_is_damage(two, content):
    (two / "checkpoints" / "2" / MANIFEST).write_bytes(content)
    found, said = restore(two)
    assert (found.step, len(said)) == (1, 1)
    assert "checkpoint 2 is damaged (" in said[0]


@pytest.mark.parametrize("sealed", [True, False])
def test_a_manifest_without_an_entry_whose_file_is_gone_too(two, sealed):
    folder = two / "checkpoints" / "2"
    entries = json.loads((folder / MANIFEST).read_text())
    del entries["state/weights/.zarray"]
    if not sealed:
        del entries[MANIFEST]
    (folder / MANIFEST).write_text(json.dumps(entries))
    (folder / "state" / "weights" / ".zarray").unlink()
    found, said = restore(two)
    assert (found.step, len(said)) == (1, 1)
    assert f"checkpoint 2 is {'damaged' if sealed else 'unusable'} (" in said[0]


def test_a_folder_without_a_manifest_is_an_unfinished_write(two):
    (two / "checkpoints" / "9").mkdir()
    found, said = restore(two)
    assert found.step == 2
    assert said == [
        "checkpoint 9 is damaged (its write was not finished), it is set aside as damaged-9"
    ]
    save_steps(two, [9])  # the step can be saved anew
    assert restore(two)[0].step == 9


def test_all_damaged_means_starting_over_with_everything_kept(two):
    for step in "12":
        (two / "checkpoints" / step / MANIFEST).unlink()
    found, said = restore(two)
    assert found is None
    assert len(said) == 2
    assert names(two) == {"damaged-1", "damaged-2"}


def test_a_manifest_names_the_fault(tmp_path):
    (tmp_path / "a").write_text("one")
    write_manifest(tmp_path)
    assert manifest_fault(tmp_path) is None
    (tmp_path / "a").write_text("two")
    assert manifest_fault(tmp_path) == "a has changed"
    (tmp_path / "a").write_text("longer")
    assert manifest_fault(tmp_path) == "a has 6 bytes instead of 3"


def test_a_free_name_is_found_for_what_is_set_aside(tmp_path):
    for _ in range(3):
        (tmp_path / "5").mkdir()
        set_aside(tmp_path, 5, "damaged")
    assert {p.name for p in tmp_path.iterdir()} == {"damaged-5", "damaged-5-2", "damaged-5-3"}


# Reads that fail


def failing(times, code, real):
    """`real`, which raises an OSError the first `times` times."""
    left = [times]

    def call(*arguments, **settings):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(code, os.strerror(code), "somewhere")
        return real(*arguments, **settings)

    return call


READS = {
    "the list of steps": (os, "listdir"),
    "a manifest": (Path, "read_bytes"),
    "a size": (manifest, "_size"),
    "a file": (manifest, "digest_file"),
}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("place", READS)
def test_a_failing_read_changes_nothing_and_one_that_recovers_is_no_fault(
    two, monkeypatch, place, code
):
    before = contents(two)
    owner, name = READS[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(10_000, code, getattr(owner, name)))
        with pytest.raises(UserError, match=r"cannot read .*Nothing was changed") as refused:
            restore(two)
    assert "\n" not in str(refused.value)
    assert contents(two) == before
    monkeypatch.setattr(owner, name, failing(3, code, getattr(owner, name)))
    found, said = restore(two)
    assert (found.step, said) == (2, [])


def test_a_read_that_fails_inside_the_library_changes_nothing(two, monkeypatch):
    before = contents(two)

    def fail(*_):
        raise ValueError("NOT_FOUND: Error reading local file: [Input/output error]")

    saved = open_checkpoints(two)
    monkeypatch.setattr(saved._checkpointer, "restore", fail)
    with pytest.raises(UserError, match=r"cannot read .*/2/state: Input/output error"):
        saved.restore(shapes(STATE), print)
    saved.close()
    assert contents(two) == before


# Other versions


def rewrite(folder, change):
    """Changes `extra` of a checkpoint as another version would have written it."""
    path = folder / "extra" / "metadata"
    extra = json.loads(path.read_text())
    change(extra)
    path.write_text(json.dumps(extra))
    write_manifest(folder)


VERSIONS = {
    "a newer version of moe_jax wrote it in format 3": lambda extra: extra.update(format=3),
    "another version of moe_jax wrote it in format 1": lambda extra: extra.update(format=1),
    "its setting fame no longer exists": lambda extra: extra["config"].update(fame=1),
    "without tokenizer": lambda extra: extra.pop("tokenizer"),
    "without data_state": lambda extra: extra.pop("data_state"),
    "its settings are 3": lambda extra: extra.update(config=3),
}


@pytest.mark.parametrize("reason", VERSIONS)
def test_a_checkpoint_of_another_version_is_passed_over_or_refused_but_kept(two, reason):
    folder = two / "checkpoints"
    rewrite(folder / "2", VERSIONS[reason])
    found, said = restore(two)
    assert (found.step, len(said)) == (1, 1)
    assert said[0].startswith("checkpoint 2 is unusable (")
    assert reason in said[0]
    assert names(two) == {"1", "unusable-2"}
    rewrite(folder / "1", VERSIONS[reason])
    before = contents(two)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used") as refused:
        restore(two)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
    assert contents(two) == before


def test_arrays_of_another_shape_are_refused_and_kept(two):
    before = contents(two)
    with pytest.raises(UserError, match=r"its weights is float32\[5000\], and this run"):
        restore(two, {**shapes(STATE), "weights": jax.ShapeDtypeStruct((4,), jnp.float32)})
    assert contents(two) == before


# Paths


@pytest.mark.parametrize("name", ["v[1]", "[!a]*", "a?{b}", "~x", "é %20#", "line\nbreak"])
def test_a_path_with_the_characters_of_a_pattern_works(tmp_path, name):
    out = tmp_path / name / "below"
    save_steps(out, [1, 2, 3])
    assert restore(out)[0].step == 3
    assert kept_steps(out) == [2, 3]


@pytest.mark.parametrize("path", ["back\\slash/run", "/s3/run", "/gs/run", "no\udcffutf8"])
def test_a_path_that_the_library_would_change_is_refused_at_once(tmp_path, path):
    with pytest.raises(UserError, match="choose another --out") as refused:
        open_checkpoints(tmp_path / path)
    assert "\n" not in str(refused.value)
    assert str(refused.value).isprintable()


def test_no_manifest_for_a_checkpoint_that_does_not_open_again(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    real = checkpoints.require_arrays

    def lose_an_array(folder, count):
        shutil.rmtree(folder / "half")
        real(folder, count)

    monkeypatch.setattr(checkpoints, "require_arrays", lose_an_array)
    with pytest.raises(UserError, match="has 2 arrays, and not the 3 saved"):
        save_steps(tmp_path, [2])
    assert kept_steps(tmp_path) == [1]


def test_an_array_without_its_data_does_not_open(two):
    folder = two / "checkpoints" / "1" / "state"
    arrays.require_arrays(folder, 3)
    (folder / "weights" / "0").unlink()
    with pytest.raises(UserError, match=r"weights does not open again"):
        arrays.require_arrays(folder, 3)


# Saves that fail


def own_threads():
    return {t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()}


def test_a_folder_that_cannot_be_made_ends_the_run_at_once(tmp_path, capfd):
    save_steps(tmp_path, [1])
    before = own_threads()
    saved = open_checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "unfinished")
    (tmp_path / "checkpoints" / "unfinished").write_text("a file")
    began = time.monotonic()
    with pytest.raises(UserError):
        saved.save(2, STATE, EXTRA)
    saved.close()
    assert time.monotonic() - began < 2
    assert own_threads() <= before
    assert capfd.readouterr().err == ""
    assert restore(tmp_path, read_only=True)[0].step == 1


def save_and_wait(saved, step, state):
    saved.save(step, state, EXTRA)
    saved.wait()


@pytest.mark.parametrize("limit", [0, 40, 4000])
def test_a_disk_that_takes_no_more_is_one_line(tmp_path, capfd, limit):
    """Real errors from the system (EFBIG), in Orbax, in tensorstore and in our own writes."""
    big = {**STATE, "weights": jax.random.normal(jax.random.key(0), (5000,))}  # hard to compress
    save_steps(tmp_path, [1])
    saved = open_checkpoints(tmp_path)
    before = own_threads()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    began = time.monotonic()
    try:
        with pytest.raises(UserError, match=r"cannot write in .*File too large"):
            save_and_wait(saved, 2, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with suppress(UserError):  # Orbax may repeat it
        saved.close()
    assert time.monotonic() - began < 2
    assert capfd.readouterr().err == ""
    for thread in own_threads() - before:
        if not thread.name.startswith(("metadata_store", "asyncio")):  # idle ones of pools
            thread.join(2)
            assert not thread.is_alive()
    assert restore(tmp_path)[0].step == 1
    save_steps(tmp_path, [2])
    assert restore(tmp_path)[0].step == 2


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path, monkeypatch):
    saved = open_checkpoints(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_manifest", full)
    saved.save(1, STATE, EXTRA)
    with pytest.raises(UserError, match=r"cannot write in .*No space left"):
        saved.wait()
    saved.close()
    assert kept_steps(tmp_path) == []
