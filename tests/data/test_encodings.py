"""Files that are not UTF-8: decoded by their byte-order mark, or left out as no text."""

import codecs
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.base.errors import UserError
from moe_jax.data import encodings
from moe_jax.data.corpus import Opening, open_corpus, sample
from moe_jax.data.encodings import pieces
from moe_jax.data.files import FileCorpus
from tests.data.small_corpus import TEXTS, Prepare
from tests.data.test_corpus import texts
from tests.data.test_tokens import documents

TEXT = "naïve café\n日本語 🙂 and more, line by line\n" * 300
MARKED = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
each_encoding = pytest.mark.parametrize("encoding", MARKED)


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode), st.integers(1, 9))
def test_pieces_join_to_the_decoded_bytes(data: bytes, size: int):
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    decoded = list(pieces(blocks))
    text = data.decode("utf-8", "replace")
    assert "".join(piece for piece, _ in decoded) == text
    try:
        data.decode()
        assert not decoded[-1][1]
    except UnicodeDecodeError:
        assert decoded[-1][1]


@each_encoding
@settings(deadline=None)
@given(data=st.binary(max_size=60), size=st.integers(1, 9))
def test_pieces_in_other_encodings(encoding: str, data: bytes, size: int):
    for content in (data, data.decode("utf-8", "replace").encode(encoding)):
        blocks = [content[i : i + size] for i in range(0, len(content), size)]
        joined = "".join(piece for piece, _ in pieces(blocks, encoding))
        assert joined == content.decode(encoding, "replace")


def test_pieces_end_before_newlines():
    decoded = [text for text, _ in pieces([b"ab\n\n", b"  cd\ne", b"f"])]
    assert decoded == ["ab", "\n\n  cd", "\nef"]


def test_a_replacement_character_in_the_text_is_no_damage():
    assert list(pieces(["\ufffd ok".encode()])) == [("\ufffd ok", False)]


@each_encoding
def test_a_marked_file_is_the_same_text(tmp_path: Path, encoding: str, monkeypatch):
    monkeypatch.setattr(encodings, "PIECE_BYTES", 333)
    (tmp_path / "marked").write_bytes(MARKED[encoding] + TEXT.encode(encoding))
    (tmp_path / "utf-8").write_text(TEXT)
    corpus = open_corpus(f"files:{tmp_path}")
    assert texts(corpus) == {"marked": TEXT, "utf-8": TEXT}
    assert corpus.sizes.tolist() == [len(TEXT.encode())] * 2
    assert len(set(corpus.contents().tolist())) == 1


@each_encoding
def test_excerpts_of_a_marked_file(tmp_path: Path, encoding: str):
    (tmp_path / "marked").write_bytes(MARKED[encoding] + TEXT.encode(encoding))
    corpus = open_corpus(f"files:{tmp_path}")
    size = int(corpus.sizes[0])
    for start in (0, 1, size // 2, size - 9):
        excerpt = corpus.excerpt(0, start, 100)
        assert excerpt in TEXT
        assert 0 < len(excerpt.encode()) <= 100
    excerpts = list(sample(corpus, np.array([0]), 8192))
    assert all(excerpt in TEXT for excerpt in excerpts)
    assert excerpts[0].startswith("naïve")


def test_a_lone_mark_is_an_empty_text(tmp_path: Path):
    (tmp_path / "a").write_bytes(codecs.BOM_UTF16_LE)
    (tmp_path / "b").write_text("b")
    assert open_corpus(f"files:{tmp_path}").sizes.tolist() == [0, 1]


def test_the_mark_of_utf8_is_a_character(tmp_path: Path):
    (tmp_path / "a").write_bytes(codecs.BOM_UTF8 + b"text")
    assert texts(open_corpus(f"files:{tmp_path}")) == {"a": "\ufefftext"}


def test_files_with_nul_bytes_are_left_out_and_named(folder: Path):
    (folder / "deep" / "photo.png").write_bytes(b"\x89PNG" + bytes(9))
    (folder / "late.bin").write_bytes(b"text" * encodings.PIECE_BYTES + b"\0")
    (folder / "unmarked.txt").write_bytes("UTF-16 without a mark".encode("utf-16-le"))
    said: list[str] = []
    corpus = open_corpus(f"files:{folder}", how=Opening(say=said.append))
    assert texts(corpus) == TEXTS
    assert said == [
        "data.source leaves out 3 files with NUL bytes, as data.binary is False "
        "(deep/photo.png, late.bin, unmarked.txt)"
    ]
    asked = open_corpus(f"files:{folder}", how=Opening(binary=True, say=pytest.fail))
    assert isinstance(asked, FileCorpus)
    assert set(asked.names) == {*TEXTS, "deep/photo.png", "late.bin", "unmarked.txt"}


def test_nothing_but_binary_files(tmp_path: Path):
    for name in "abcde":
        (tmp_path / name).write_bytes(b"\0")
    said: list[str] = []
    with pytest.raises(UserError, match="matches 5 files and all have NUL bytes"):
        open_corpus(f"files:{tmp_path}", how=Opening(say=said.append))
    assert "5 files with NUL bytes, as data.binary is False (a, b, c, …)" in said[0]


def test_binary_files_are_tokenised_if_asked_for(prepared: Prepare):
    (prepared.folder / "nul").write_bytes(b"a\0b")
    without = prepared()
    assert "a\0b" not in documents(without.train) + documents(without.validation)
    data = prepared(binary=True)
    assert "a\0b" in documents(data.train) + documents(data.validation)


def test_binary_files_are_remembered(prepared: Prepare, monkeypatch):
    monkeypatch.setattr("moe_jax.data.contents.SETTLED_SECONDS", 0)
    (prepared.folder / "nul").write_bytes(b"a\0b")
    (prepared.folder / "wide").write_text("wide", "utf-16")
    cold = prepared()
    read = "moe_jax.data.contents.read_content"
    monkeypatch.setattr(read, lambda path: pytest.fail(f"read {path}"))
    assert prepared().fingerprint == cold.fingerprint
    assert "1 files with NUL bytes" in prepared.said[-1]
