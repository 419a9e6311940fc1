import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.data import contents
from moe_jax.data.cache import HashIndex
from moe_jax.data.corpus import Corpus, Opening, open_corpus, sample, split
from moe_jax.data.files import FileCorpus
from tests.data.small_corpus import TEXTS, quiet


def fingerprint(source: str, cache: Path) -> str:
    return open_corpus(source, how=Opening(cache)).fingerprint


def texts(corpus: Corpus) -> dict[str, str]:
    indices = range(len(corpus.sizes))
    return {corpus.name(i): "".join(piece.text for piece in corpus.read(i)) for i in indices}


def test_glob_reads_every_file_once(folder: Path):
    assert texts(open_corpus(f"files:{folder}/**/**/*")) == TEXTS


def test_names_do_not_depend_on_where_the_folder_is(folder: Path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    relative = open_corpus("files:corpus/**/*.txt")
    assert texts(relative) == texts(open_corpus(f"files:{folder}/**/*.txt"))


def test_a_relative_glob_in_a_folder_with_a_strange_name(tmp_path: Path, monkeypatch):
    (tmp_path / "x[1]*").mkdir()
    (tmp_path / "x[1]*" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path / "x[1]*")
    assert list(texts(open_corpus("files:../*/*.txt")).values()) == ["a"]
    assert list(texts(open_corpus("files:*.txt")).values()) == ["a"]


def test_home_is_expanded(folder: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert list(texts(open_corpus("files:~/*.py"))) == ["a.py"]


def test_stdlib_leaves_installed_packages_out():
    corpus = open_corpus("stdlib")
    assert isinstance(corpus, FileCorpus)
    assert "json/decoder.py" in corpus.names
    assert corpus.names == sorted(corpus.names)
    assert not any("site-packages" in name or "__pycache__" in name for name in corpus.names)


@pytest.mark.parametrize("source", ["nothing", "files:", "hf:", "http://x"])
def test_unknown_source(source: str):
    with pytest.raises(UserError, match="unknown"):
        open_corpus(source)


def test_glob_without_files_is_named(folder: Path):
    with pytest.raises(UserError, match=r"\*\.rs' matches no file"):
        open_corpus(f"files:{folder}/*.rs")


def test_only_empty_files(folder: Path):
    with pytest.raises(UserError, match="all are empty"):
        open_corpus(f"files:{folder}/deep/empty*")


def test_unreadable_file_is_named(folder: Path):
    corpus = open_corpus(f"files:{folder}/*.py")
    (folder / "a.py").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.py: No such file"):
        list(corpus.read(0))


def test_broken_links_and_folders_are_no_files(folder: Path):
    (folder / "broken.txt").symlink_to(folder / "nowhere")
    assert list(texts(open_corpus(f"files:{folder}/*"))) == ["a.py", "b.txt", "d.txt"]


def test_split_is_stable_and_complete(folder: Path):
    corpus = open_corpus(f"files:{folder}/**/*")
    assert isinstance(corpus, FileCorpus)
    before = dict(zip(corpus.names, split(corpus, 0.3), strict=True))
    assert 0 < sum(before.values()) < len(before)
    for i in range(20):
        (folder / f"new{i}.txt").write_text("x")
    more = open_corpus(f"files:{folder}/**/*")
    assert isinstance(more, FileCorpus)
    after = dict(zip(more.names, split(more, 0.3), strict=True))
    assert sum(before[name] != after[name] for name in before) <= 2  # lowest and highest hash


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_neither_side_of_the_split_is_without_text(folder: Path, fraction: float):
    corpus = open_corpus(f"files:{folder}/**/*")
    held_out = split(corpus, fraction)
    assert corpus.sizes[held_out].sum() > 0
    assert corpus.sizes[~held_out].sum() > 0


def test_one_document_cannot_be_split(folder: Path):
    for pattern in ("a.py", "deep/*"):  # the second has an empty file besides
        with pytest.raises(UserError, match="at least two"):
            split(open_corpus(f"files:{folder}/{pattern}"), 0.5)


def test_sample_is_even_and_bounded(tmp_path: Path):
    (tmp_path / "long").write_text("".join(f"{i:07d}\n" for i in range(5000)))
    (tmp_path / "short").write_text("short")
    corpus = open_corpus(f"files:{tmp_path}/*")
    everything = np.arange(2)
    assert sum(map(len, sample(corpus, everything, 50_000))) == 40_005
    excerpts = list(sample(corpus, everything, 3 * 4096))
    assert len(excerpts) == 3
    assert excerpts[0].startswith("0000000\n0000001")
    assert excerpts[1].startswith("\n0001667\n")  # a third of the way: byte 40005 // 3
    assert sum(map(len, excerpts)) <= 3 * 4096
    assert list(sample(corpus, np.array([1]), 100)) == ["short"]


def test_changed_content_of_the_same_size_is_noticed(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(contents, "SETTLED_SECONDS", 0)  # trust even the youngest time stamps
    path = folder / "d.txt"
    pattern = f"files:{folder}/**/*"
    before = fingerprint(pattern, tmp_path)
    stat = path.stat()
    time.sleep(0.02)  # a tick of the file system's clock
    path.write_text(path.read_text().replace("one", "two"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(pattern, tmp_path) != before


def test_unchanged_files_are_not_read_again(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(contents, "SETTLED_SECONDS", 0)
    before = fingerprint(f"files:{folder}/**/*", tmp_path)
    monkeypatch.setattr(contents, "read_content", lambda path: pytest.fail(f"read {path}"))
    assert fingerprint(f"files:{folder}/**/*", tmp_path) == before


def test_files_just_written_are_read_again(folder: Path, tmp_path: Path):
    fingerprint(f"files:{folder}/**/*", tmp_path)
    assert not list(tmp_path.glob("hashes-*"))


def test_renaming_changes_the_fingerprint(folder: Path, tmp_path: Path):
    before = fingerprint(f"files:{folder}/**/*", tmp_path)
    (folder / "d.txt").rename(folder / "e.txt")
    assert fingerprint(f"files:{folder}/**/*", tmp_path) != before


def test_an_index_remembers_and_a_changed_state_does_not_match(tmp_path: Path):
    index = HashIndex(tmp_path, "corpus")
    index.recall("a", [1], lambda: "old")
    index.save()
    assert HashIndex(tmp_path, "corpus").recall("a", [1], lambda: "new") == "old"
    assert HashIndex(tmp_path, "corpus").recall("a", [2], lambda: "new") == "new"
    assert HashIndex(tmp_path, "other").recall("a", [1], lambda: "new") == "new"


def one_digit(path: Path) -> None:
    """Another digit in a hash: the file is still JSON."""
    text = path.read_text()
    path.write_text(text.replace("0", "1") if "0" in text else text.replace("2", "3"))


@pytest.mark.parametrize(
    "damage",
    [
        one_digit,
        lambda path: path.write_text("{"),
        lambda path: path.write_text('{"a": [1, "old"]}'),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_bytes(b""),
    ],
)
def test_a_damaged_index_is_made_anew_with_a_line(tmp_path: Path, damage):
    index = HashIndex(tmp_path, "corpus", quiet)
    index.recall("a", [1], lambda: "10203")
    index.save()
    (path,) = tmp_path.glob("hashes-*")
    damage(path)
    said: list[str] = []
    index = HashIndex(tmp_path, "corpus", said.append)
    assert len(said) == 1
    assert "is damaged or of another version: reading the text again" in said[0]
    assert index.recall("a", [1], lambda: "new") == "new"
    index.save()
    assert HashIndex(tmp_path, "corpus", pytest.fail).recall("a", [1], pytest.fail) == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    """A local data set with three rows, one of them null."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    rows = ['{"text": "hello", "n": 1}', '{"text": null, "n": 2}', '{"text": "café", "n": 3}']
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("\n".join(rows))
    return tmp_path / "rows"


def test_hub_reads_a_local_folder(hub: Path, tmp_path: Path):
    corpus = open_corpus(f"hf:{hub}")
    assert texts(corpus) == {"0": "hello", "1": "", "2": "café"}
    assert corpus.sizes.tolist() == [5, 0, 5]
    assert list(sample(corpus, np.array([2]), 3)) == ["caf"]
    before = fingerprint(f"hf:{hub}", tmp_path)
    assert before == corpus.fingerprint
    assert fingerprint(f"hf:{hub}", tmp_path) == before
    path = hub / "train.jsonl"
    path.write_text(path.read_text().replace("hello", "hallo"))
    assert fingerprint(f"hf:{hub}", tmp_path) != before


def test_rows_with_the_same_text_are_on_one_side(hub: Path):
    rows = [json.dumps({"text": f"text {i % 7}"}) for i in range(99)]
    (hub / "train.jsonl").write_text("\n".join(rows))
    held_out = split(open_corpus(f"hf:{hub}"), 0.4)
    assert set(held_out[:7]) == {True, False}
    assert held_out.tolist() == [held_out[i % 7] for i in range(99)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: bytes(64) + data[64:],
        lambda data: data.replace(b"hello", b"hellp"),
    ],
)
def test_damaged_rows_of_the_hub_are_made_again(hub: Path, tmp_path: Path, damage):
    before = fingerprint(f"hf:{hub}", tmp_path)
    (path,) = (tmp_path / "hf").rglob("*.arrow")
    path.write_bytes(damage(path.read_bytes()))
    said: list[str] = []
    corpus = open_corpus(f"hf:{hub}", how=Opening(tmp_path, say=said.append))
    split(corpus, 0.5)
    assert corpus.fingerprint == before
    assert texts(corpus)["0"] == "hello"
    assert len(said) == 1
    assert "are damaged" in said[0]


def test_hub_refuses_a_folder_that_is_a_pattern(hub: Path):
    strange = hub.rename(hub.with_name("rows[1]"))
    with pytest.raises(UserError, match="rename the folder"):
        open_corpus(f"hf:{strange}")


def test_hub_column_must_hold_text(hub: Path):
    with pytest.raises(UserError, match=r"no column 'body'.* one of text, n"):
        open_corpus(f"hf:{hub}", "body")
    with pytest.raises(UserError, match=r"'n'.* holds int64"):
        open_corpus(f"hf:{hub}", "n")


def test_hub_without_network(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(name: str, split: str):
        raise ConnectionError(f"Couldn't reach '{name}'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"cannot load .*some/name': Couldn't") as info:
        open_corpus("hf:some/name")
    assert "\n" not in str(info.value)


def test_hub_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'moe_jax\[hf\]'"):
        open_corpus("hf:some/name")
