import errno
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import CheckpointConfig
from moe_jax.train import checkpoint as module
from moe_jax.train.checkpoint import FORMAT, MANIFEST, Checkpoints, manifest_fault


@pytest.fixture
def state():
    return {"weights": jnp.arange(5000, dtype=jnp.float32), "step": jnp.asarray(3)}


def open_checkpoints(path, keep=2):
    return Checkpoints(path, CheckpointConfig(keep=keep))


def shapes(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def save_steps(path, state, steps, bits=None, keep=2):
    checkpoints = open_checkpoints(path, keep)
    for step in steps:
        scaled = jax.tree.map(lambda leaf, s=step: leaf * s, state)
        checkpoints.save(step, scaled, {"at": step, "text": "é"}, (bits or {}).get(step))
    checkpoints.close()


def restore(path, state):
    said = []
    checkpoints = open_checkpoints(path)
    found = checkpoints.restore(shapes(state), said.append)
    checkpoints.close()
    return found, said


def test_round_trip(tmp_path, state):
    save_steps(tmp_path, state, [7])
    found, said = restore(tmp_path, state)
    assert (found.step, said) == (7, [])
    assert found.extra == {"at": 7, "text": "é", "format": FORMAT}
    np.testing.assert_array_equal(found.state["weights"], 7 * np.arange(5000))


def test_a_checkpoint_of_another_format_is_refused_in_one_line(tmp_path, state, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", 1)
        save_steps(tmp_path, state, [7])
    checkpoints = open_checkpoints(tmp_path)
    with pytest.raises(UserError, match=r"format 1, this version .* choose another --out") as error:
        checkpoints.peek(print)
    checkpoints.close()
    assert "\n" not in str(error.value)
    assert kept_steps(tmp_path) == [7]


def test_nothing_saved_yet(tmp_path, state):
    assert restore(tmp_path, state) == (None, [])


def kept_steps(path):
    return sorted(int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit())


def test_the_last_ones_and_the_best_are_kept(tmp_path, state):
    save_steps(tmp_path, state, [1, 2, 3, 4, 5], bits={1: 3.0, 2: 1.5, 4: 2.0, 5: math.nan})
    assert kept_steps(tmp_path) == [2, 4, 5]
    save_steps(tmp_path, state, [6, 7], bits={6: 1.7})  # in another process, as it were
    assert kept_steps(tmp_path) == [2, 6, 7]
    save_steps(tmp_path, state, [8, 9, 10], bits={8: 1.2})
    assert kept_steps(tmp_path) == [8, 9, 10]


def test_reading_leaves_a_save_under_way_alone(tmp_path, state):
    save_steps(tmp_path, state, [1, 2])
    folder = tmp_path / "checkpoints"
    (folder / "2" / MANIFEST).unlink()
    (folder / "3.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), read_only=True)
    assert checkpoints.restore(shapes(state), lambda _: None).step == 1
    checkpoints.close()
    assert {p.name for p in folder.iterdir()} >= {"1", "2", "3.orbax-checkpoint-tmp"}


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda f: largest_file(f).write_bytes(largest_file(f).read_bytes()[:-20]),
    "emptied": lambda f: largest_file(f).write_bytes(b""),
    "one bit flipped": lambda f: flip_a_bit(largest_file(f)),
    "a file deleted": lambda f: largest_file(f).unlink(),
    "manifest cut": lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:-5]),
    "write not finished": lambda f: (f / MANIFEST).unlink(),
    "only a folder": lambda f: [shutil.rmtree(f), f.mkdir()],
    "an empty manifest": lambda f: (f / MANIFEST).write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, state, damage):
    save_steps(tmp_path, state, [1, 2])
    DAMAGE[damage](tmp_path / "checkpoints" / "2")
    found, said = restore(tmp_path, state)
    assert found.step == 1
    assert found.extra["at"] == 1
    assert len(said) == 1
    assert said[0].startswith("checkpoint 2 is damaged (")
    save_steps(tmp_path, state, [2])  # the step can be saved anew
    assert restore(tmp_path, state)[0].step == 2


def test_all_damaged_means_starting_over(tmp_path, state):
    save_steps(tmp_path, state, [1, 2])
    for step in "12":
        (tmp_path / "checkpoints" / step / MANIFEST).unlink()
    found, said = restore(tmp_path, state)
    assert found is None
    assert len(said) == 2


def test_a_manifest_names_the_fault(tmp_path):
    (tmp_path / "a").write_text("one")
    module.write_manifest(tmp_path)
    assert manifest_fault(tmp_path) is None
    (tmp_path / "a").write_text("two")
    assert manifest_fault(tmp_path) == "a has changed"
    (tmp_path / "a").write_text("longer")
    assert manifest_fault(tmp_path) == "a has 6 bytes instead of 3"


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path, state, monkeypatch):
    checkpoints = open_checkpoints(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_manifest", full)
    checkpoints.save(1, state, {})
    with pytest.raises(UserError, match=r"cannot write in .*No space left"):
        checkpoints.wait()
    checkpoints.close()
