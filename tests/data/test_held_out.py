"""No text is in training and in validation: one file is one document, and copies stay together."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.base.errors import UserError
from moe_jax.base.hashes import digest
from moe_jax.data.corpus import Corpus, Document, Opening, moved, open_corpus, split
from moe_jax.data.files import FileCorpus
from tests.data.small_corpus import Prepare, quiet
from tests.data.test_tokens import documents


class Rows(Corpus):
    """Texts in memory, named by their number as the rows of a data set are."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.sizes = np.array([len(text.encode()) for text in texts], np.int64)

    @property
    def fingerprint(self) -> str:
        return digest(*self.texts)

    def contents(self) -> np.ndarray:
        return np.array([int(digest(text)[:16], 16) for text in self.texts], np.uint64)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Iterator[Document]:
        yield Document(str(index), self.texts[index])

    def excerpt(self, index: int, start: int, size: int) -> str:
        return self.texts[index].encode()[start : start + size].decode()


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["", *"abcdefgh"]), min_size=1, max_size=40),
    st.sampled_from([1e-9, 0.02, 0.5, 1 - 1e-9]),
)
def test_no_text_is_on_both_sides(texts: list[str], fraction: float):
    corpus = Rows(texts)
    if len(set(texts) - {""}) < 2:
        with pytest.raises(UserError, match=r"with text of its own: .* at least two"):
            split(corpus, fraction)
        return
    held_out = split(corpus, fraction)
    train = {text for text, held in zip(texts, held_out, strict=True) if text and not held}
    validation = {text for text, held in zip(texts, held_out, strict=True) if text and held}
    assert train
    assert validation
    assert not train & validation
    if len(set(texts)) == len(texts):
        assert moved(corpus, fraction) == ""


def test_a_copy_goes_where_the_first_is_and_moves_nothing_else():
    texts = [f"text {i}" for i in range(200)]
    before = split(Rows(texts), 0.3)
    # Copies of every document. By their own numbers, 3 in 10 would be held out.
    after = split(Rows(texts + texts), 0.3)
    np.testing.assert_array_equal(after[:200], before)
    np.testing.assert_array_equal(after[200:], before)
    assert moved(Rows(texts + texts), 0.3) != ""
    assert moved(Rows(texts), 0.3) == ""


def opened(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the documents, and the lines that were said."""
    said: list[str] = []
    corpus = open_corpus(f"files:{folder}/**/*", how=Opening(say=said.append))
    assert isinstance(corpus, FileCorpus)
    return corpus.names, said


def test_one_real_file_is_one_document_under_its_own_name(folder: Path):
    before, said = opened(folder)
    assert said == []
    (folder / "0alias.txt").symlink_to("a.py")
    (folder / "alias.txt").symlink_to(folder / "deep/c.txt")
    os.link(folder / "d.txt", folder / "e.txt")
    (folder / "0first").symlink_to("deep")
    names, said = opened(folder)
    assert names == before
    assert said == [
        "data.source leaves out 1 links to folders that are read anyway (0first); "
        "3 further names of files (0alias.txt, alias.txt, e.txt)"
    ]


def test_a_linked_file_outside_is_one_document(folder: Path, tmp_path: Path):
    (tmp_path / "far.txt").write_text("far away")
    for name in ("x.txt", "y.txt"):
        (folder / name).symlink_to(tmp_path / "far.txt")
    names, said = opened(folder)
    assert "x.txt" in names
    assert "y.txt" not in names
    assert "1 further names of files (y.txt)" in said[0]


def test_a_link_to_the_folder_itself_changes_nothing(prepared: Prepare):
    before = prepared()
    (prepared.folder / "latest").symlink_to(".")
    after = prepared()
    assert after.fingerprint == before.fingerprint
    assert "1 links to folders that are read anyway (latest)" in prepared.said[-1]


def test_copies_are_tokenised_on_one_side(prepared: Prepare):
    for i in range(12):
        (prepared.folder / f"copy{i}.txt").write_bytes((prepared.folder / "b.txt").read_bytes())
    (prepared.folder / "wide.txt").write_text((prepared.folder / "b.txt").read_text(), "utf-16")
    data = prepared()
    train = set(documents(data.train)) - {""}
    validation = set(documents(data.validation)) - {""}
    assert train
    assert validation
    assert not train & validation


def test_arrays_that_were_split_otherwise_are_not_taken_from_the_cache(prepared, monkeypatch):
    """Such as those of a version that split by names alone."""
    for i in range(12):
        (prepared.folder / f"copy{i}.txt").write_bytes((prepared.folder / "b.txt").read_bytes())
    apart = prepared()
    monkeypatch.setattr("moe_jax.data.tokens.moved", lambda corpus, fraction: "")
    for path in prepared.cache.glob("hashes-*"):
        path.unlink()
    assert prepared().fingerprint != apart.fingerprint


def test_an_unchanged_corpus_is_split_once(prepared: Prepare, monkeypatch):
    prepared()
    monkeypatch.setattr("moe_jax.data.tokens.moved", lambda *_: pytest.fail("split again"))
    prepared()


def test_the_library_is_split_by_names_alone():
    """The recorded results were made with that split."""
    corpus = open_corpus("stdlib", how=Opening(say=quiet))
    assert moved(corpus, 0.02) == ""
