import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.data import cache, contents, encodings, writer
from moe_jax.data.tokenizer import Tokenizer, make_tokenizer
from moe_jax.data.tokens import TokenArray, prepare
from tests.data.small_corpus import TEXTS, Prepare, quiet


def documents(array: TokenArray) -> list[str]:
    """The text of each document, with its frame checked."""
    bounds = [*array.starts.tolist(), len(array.tokens)]
    framed = [array.tokens[a:b] for a, b in pairwise(bounds)]
    assert all(ids[0] == array.tokenizer.bos and ids[-1] == array.tokenizer.eos for ids in framed)
    return [array.tokenizer.decode(ids) for ids in framed]


@pytest.mark.parametrize("kind", ["bytes", "bpe:300"])
def test_every_document_is_on_one_side_unchanged(prepared: Prepare, kind: str):
    data = prepared(tokenizer=kind)
    train = documents(data.train)
    validation = documents(data.validation)
    assert sorted(train + validation) == sorted(TEXTS.values())
    for array, texts in ((data.train, train), (data.validation, validation)):
        assert array.text() == "".join(texts).encode()
        assert b"".join(array.chunks(7)) == array.text()
        assert array.bytes == len(array.text())


def test_stats(prepared: Prepare):
    data = prepared()
    for array, name in ((data.train, "train"), (data.validation, "validation")):
        expected = {"documents": len(array.starts), "bytes": array.bytes}
        assert data.stats[name] == {**expected, "tokens": len(array.tokens)}
    assert data.stats["replaced"] == 0


def test_a_warm_start_only_opens(prepared: Prepare):
    cold = prepared()
    assert any("tokenising" in line for line in prepared.said)
    warm = prepared()
    assert prepared.said == []
    assert warm.fingerprint == cold.fingerprint
    assert warm.stats == cold.stats
    np.testing.assert_array_equal(warm.train.tokens, cold.train.tokens)


def test_the_trained_tokenizer_handed_in_finds_the_same_entry(prepared: Prepare):
    cold = prepared()
    resumed = prepared(Tokenizer.from_json(cold.tokenizer.to_json()))
    assert resumed.fingerprint == cold.fingerprint
    assert prepared.said == []


def test_another_tokenizer_handed_in_is_used(prepared: Prepare):
    other = make_tokenizer("bpe:280", ["other text " * 9], quiet)
    assert prepared(other).tokenizer is other


def test_validation_text_does_not_reach_the_tokenizer(prepared: Prepare):
    before = prepared()
    held_out = documents(before.validation)
    for name, text in TEXTS.items():
        if text and text in held_out:
            (prepared.folder / name).write_text("zqzq" * 99)
    assert prepared().tokenizer.fingerprint == before.tokenizer.fingerprint


@pytest.mark.parametrize(
    "setting", [{"tokenizer": "bpe:310"}, {"tokenizer": "bytes"}, {"validation_fraction": 0.31}]
)
def test_settings_that_matter_change_the_fingerprint(prepared: Prepare, setting: dict):
    assert prepared().fingerprint != prepared(**setting).fingerprint


def test_a_changed_file_is_tokenised_again(prepared: Prepare):
    before = prepared()
    path = prepared.folder / "d.txt"
    path.write_text(path.read_text().replace("one", "two"))  # the same size
    after = prepared()
    assert after.fingerprint != before.fingerprint
    assert any("two line" in text for text in documents(after.train) + documents(after.validation))


def test_bytes_that_are_no_utf8(prepared: Prepare):
    (prepared.folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    data = prepared()
    assert data.stats["replaced"] == 1
    assert "1 documents have bytes that are no UTF-8" in prepared.said[-1]
    assert "caf\ufffd" in documents(data.train) + documents(data.validation)


def test_a_long_file_in_pieces_has_the_tokens_of_the_whole(prepared: Prepare, monkeypatch):
    data = prepared()
    monkeypatch.setattr(encodings, "PIECE_BYTES", 64)
    monkeypatch.setattr(writer, "BATCH_CHARACTERS", 100)
    prepared.cache = prepared.cache / "pieces"
    again = prepared(data.tokenizer)
    np.testing.assert_array_equal(again.train.tokens, data.train.tokens)
    np.testing.assert_array_equal(again.validation.tokens, data.validation.tokens)


def test_wide_vocabularies_are_stored_in_32_bits(prepared: Prepare):
    assert prepared(tokenizer="bpe:65536").train.tokens.dtype == np.uint16
    assert prepared(tokenizer="bpe:65537").train.tokens.dtype == np.uint32


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize(
    "file", ["tokens-*/train.tokens", "tokens-*/train.starts", "*/meta.json", "*/tokenizer.json"]
)
def test_a_damaged_cache_is_rebuilt(prepared: Prepare, file: str, damage):
    before = prepared()
    tokens = before.train.tokens.copy()  # the mapping would show the damage
    for path in prepared.cache.glob(file):
        damage(path)
    after = prepared()
    assert any("damaged" in line for line in prepared.said)
    assert after.fingerprint == before.fingerprint
    np.testing.assert_array_equal(after.train.tokens, tokens)
    prepared()
    assert prepared.said == []


def another_digit(path: Path) -> None:
    """The last digit becomes another one: the file is still JSON."""
    text = path.read_text()
    at = max(text.rfind(digit) for digit in "0123456789")
    path.write_text(text[:at] + ("1" if text[at] == "0" else "0") + text[at + 1 :])


@pytest.mark.parametrize("damage", [flip, truncate, another_digit, Path.unlink])
def test_a_damaged_hash_index_is_no_other_text(prepared: Prepare, monkeypatch, damage):
    monkeypatch.setattr(contents, "SETTLED_SECONDS", 0)
    before = prepared()
    indices = list(prepared.cache.glob("hashes-*.json"))
    assert len(indices) == 2  # of the files and of their split
    for path in indices:
        damage(path)
    after = prepared()
    lines = ["is damaged or of another version: reading the text again"] * 2
    assert [line.split(" ", 1)[1] for line in prepared.said] == (
        [] if damage is Path.unlink else lines
    )
    assert after.fingerprint == before.fingerprint
    prepared()
    assert prepared.said == []


def test_a_file_in_place_of_an_entry(prepared: Prepare):
    before = prepared()
    for path in prepared.cache.glob("tok*"):
        shutil.rmtree(path)
        path.write_text("")
    assert prepared().fingerprint == before.fingerprint
    assert len([line for line in prepared.said if "damaged: building it again" in line]) == 2


def test_long_files_are_checked_in_places(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cache, "CHECKED_BLOCK", 4)
    monkeypatch.setattr(cache, "CHECKED_BLOCKS", 3)
    path = tmp_path / "long"
    path.write_bytes(bytes(100))
    before = cache.checksum(path)
    path.write_bytes(bytes(40) + b"x" * 60)
    assert cache.checksum(path) != before


def test_unusable_cache_folder(prepared: Prepare, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache folder .*file/cache: Not a dir.*--data\.cache"):
        prepared(cache=str(tmp_path / "file" / "cache"))


def test_full_disk(prepared: Prepare, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "sync", full)
    with pytest.raises(UserError, match=r"No space left on device \(.*--data\.cache"):
        prepared()
    assert list(prepared.cache.glob("t*")) == []  # neither entries nor temporary folders


def test_two_processes_building_at_once(prepared: Prepare):
    config = prepared.config()

    def overtaken(line: str) -> None:
        if "training" in line or "tokenising" in line:
            prepare(config, say=quiet)

    slow = prepare(config, say=overtaken)
    fast = prepare(config, say=lambda line: pytest.fail(line))
    np.testing.assert_array_equal(slow.train.tokens, fast.train.tokens)
    assert list(prepared.cache.glob("tmp-*")) == []


def test_a_killed_build_leaves_no_entry(prepared: Prepare):
    script = (
        "import os; from moe_jax.data import cache, tokens; from moe_jax.config import DataConfig\n"
        "cache.sync = lambda path: os.kill(os.getpid(), 9)\n"
        f"tokens.prepare({prepared.config(tokenizer='bytes')!r})"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = prepared.cache.glob("t*")
    (prepared.cache / "tmp-index").write_text("left by a process killed while saving an index")
    prepared(tokenizer="bytes")
    assert left.exists()  # it might belong to a process that still runs
    age = time.time() - 2 * cache.STALE_SECONDS
    for path in [left, *left.rglob("*")]:
        os.utime(path, (age, age))
    prepared()
    assert not left.exists()


def test_the_users_own_folders_in_the_cache_stay(prepared: Prepare):
    """A folder named as a temporary one, and one that lies where an entry belongs."""
    prepared(tokenizer="bytes")
    (entry,) = prepared.cache.glob("tokens-*")
    shutil.rmtree(entry)
    mine = [prepared.cache / "tmp-notes", prepared.cache / f"tmp-{'0' * 32}", entry]
    age = time.time() - 2 * cache.STALE_SECONDS
    for folder in mine:
        folder.mkdir()
        (folder / "meta.json").write_text("the user's")
        for path in (folder / "meta.json", folder):
            os.utime(path, (age, age))
    prepared(tokenizer="bytes")
    assert any("is kept as" in line for line in prepared.said)
    kept = [*mine[:2], *prepared.cache.glob(f"{entry.name}-*")]
    assert [(folder / "meta.json").read_text() for folder in kept] == 3 * ["the user's"]


@pytest.mark.parametrize(("name", "expected"), [("/x", "/x/moe_jax"), ("", "~/.cache/moe_jax")])
def test_default_cache_folder(monkeypatch, name: str, expected: str):
    monkeypatch.setenv("XDG_CACHE_HOME", name)
    assert cache.cache_folder("") == Path(expected).expanduser()
    assert cache.cache_folder("~/here") == Path.home() / "here"


def test_only_the_first_held_out_tokens_are_evaluated(prepared: Prepare):
    whole = prepared().validation
    cut = prepared(validation_tokens=20).validation
    assert len(cut.tokens) == 20
    assert whole.text().startswith(cut.text())
    assert cut.bytes == len(cut.text()) < whole.bytes
    assert whole.first(10**9) is whole


def test_held_out_tokens_without_text_are_refused(prepared: Prepare):
    """The first held-out documents may be empty: [bos, eos] each."""
    for i in range(40):
        (prepared.folder / f"0empty{i}").write_text("")
    with pytest.raises(UserError, match=r"data\.validation_tokens is 2: .* at least \d+") as info:
        prepared(validation_tokens=2)
    needed = int(str(info.value).split()[-1])
    assert prepared(validation_tokens=needed).validation.bytes > 0
    with pytest.raises(UserError, match="hold no text"):
        prepared(validation_tokens=needed - 1)
