"""Which files a source names: names with wildcards in them, links, and folders."""

import os
from pathlib import Path

import pytest

from moe_jax.data.corpus import Opening, open_corpus
from moe_jax.data.files import FileCorpus
from moe_jax.data.paths import Matches

STRANGE = ["[2024]", "v[1]*", "a?b", "back\\slash", "[!x]", "[", "é [ä]", "{a,b}"]


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(source: Path | str, said: list[str] | None = None) -> list[str]:
    said = [] if said is None else said
    corpus = open_corpus(f"files:{source}", how=Opening(say=said.append))
    assert isinstance(corpus, FileCorpus)
    return corpus.names


@pytest.mark.parametrize("folder", STRANGE)
@pytest.mark.parametrize("rest", ["*.txt", "**/*.txt", "a.txt", ""])
def test_a_folder_whose_name_is_a_pattern(tmp_path: Path, folder: str, rest: str):
    write(tmp_path / folder, "a.txt", "b.txt")
    write(tmp_path, "2/other.txt", "v1/other.txt", "x/other.txt", "axb/other.txt")
    expected = ["a.txt"] if rest == "a.txt" else ["a.txt", "b.txt"]
    assert names(tmp_path / folder / rest) == expected


@pytest.mark.parametrize("home", STRANGE)
def test_home_may_have_such_a_name(tmp_path: Path, monkeypatch, home: str):
    write(tmp_path / home, "a.txt", "deep/b.txt")
    write(tmp_path / "axb", "other.txt")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    assert names("~/*.txt") == ["a.txt"]
    assert names("~/**/*.txt") == names("~") == ["a.txt", "deep/b.txt"]
    assert names("~/deep") == ["b.txt"]


@pytest.mark.parametrize("here", STRANGE)
def test_the_working_folder_may_have_such_a_name(tmp_path: Path, monkeypatch, here: str):
    write(tmp_path / here, "a.txt")
    write(tmp_path / "axb", "other.txt")
    monkeypatch.chdir(tmp_path / here)
    for pattern in ("*.txt", "./*.txt", ".", "**"):
        assert names(pattern) == ["a.txt"]


def test_a_file_with_brackets_stands_for_itself(tmp_path: Path):
    write(tmp_path, "a[1].txt", "a1.txt")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]
    assert names(tmp_path / "a[12].txt") == ["a1.txt"]
    assert names(tmp_path / "a*.txt") == ["a1.txt", "a[1].txt"]


def test_a_file_with_a_star_leaves_the_pattern_a_pattern(tmp_path: Path):
    write(tmp_path, "*.txt", "a.txt", "*/b.txt", "c/d.txt")
    assert names(tmp_path / "*.txt") == ["*.txt", "a.txt"]
    assert names(tmp_path / "*/*.txt") == ["*/b.txt", "c/d.txt"]


def test_a_folder_stands_for_everything_below_it(tmp_path: Path):
    write(tmp_path, "a.txt", "deep/er/b.py", ".hidden/c.txt", ".d.txt")
    every = ["a.txt", "deep/er/b.py"]
    for pattern in ("", "/", "**", "**/*", "**/**/*"):
        assert names(f"{tmp_path}/{pattern}") == every
    assert names(tmp_path / ".hidden") == ["c.txt"]
    assert names(tmp_path / ".*") == [".d.txt"]


def test_two_dots_behind_a_link_lead_up_from_where_the_link_leads(tmp_path: Path):
    write(tmp_path, "far/away/deep/a.txt", "far/away/b.txt", "b.txt")
    (tmp_path / "link").symlink_to(tmp_path / "far/away/deep")
    found = open_corpus(f"files:{tmp_path}/link/../b.txt")
    assert [piece.text for piece in found.read(0)] == ["far/away/b.txt"]
    assert names(tmp_path / "link/../*.txt") == ["b.txt"]


def test_links_to_folders_above_are_not_walked_and_named(tmp_path: Path):
    corpus = write(tmp_path / "corpus", *(f"{i}.txt" for i in range(5)), "deep/6.txt")
    before = names(corpus / "**/*.txt")
    (corpus / "latest").symlink_to(".")
    (corpus / "deep/up").symlink_to("..")
    (corpus / "deep/higher").symlink_to(tmp_path)
    (corpus / "whole").symlink_to(corpus)
    for pattern in ("**/*.txt", "**", "", "*/**/*.txt", "**/*/*.txt"):
        said: list[str] = []
        found = names(f"{corpus}/{pattern}", said)
        assert set(found) <= set(before)
        (line,) = said
        assert line.startswith("data.source leaves out 4 links to folders that are read anyway (")
    assert names(corpus) == before


def test_links_that_link_to_one_another_end(tmp_path: Path):
    """Twelve folders, each with links to all others: a walk along links has 12! ways."""
    numbers = range(12)
    for a in numbers:
        write(tmp_path, f"{a}/{a}.txt")
        for b in numbers:
            (tmp_path / f"{a}" / f"to{b}").symlink_to(tmp_path / f"{b}")
    assert names(tmp_path) == sorted(f"{a}/{a}.txt" for a in numbers)


def test_a_link_to_another_folder_is_walked_once(tmp_path: Path):
    write(tmp_path, "far/a.txt", "far/deep/b.txt", "corpus/c.txt")
    (tmp_path / "corpus/one").symlink_to(tmp_path / "far")
    (tmp_path / "corpus/two").symlink_to(tmp_path / "far")
    said: list[str] = []
    assert names(tmp_path / "corpus", said) == ["c.txt", "one/a.txt", "one/deep/b.txt"]
    assert said == ["data.source leaves out 1 links to folders that are read anyway (two)"]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch):
    write(tmp_path, "a.txt", "locked/b.txt")
    (tmp_path / "broken\n\x1b.txt").symlink_to(tmp_path / "nowhere")
    scandir = os.scandir

    def locked(path: str):
        if path.endswith("locked"):
            raise PermissionError
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    said: list[str] = []
    assert names(tmp_path, said) == ["a.txt"]
    assert said == [
        "data.source leaves out 1 links that lead nowhere (broken\\n\\x1b.txt); "
        "1 folders that may not be read (locked)"
    ]


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path):
    write(tmp_path, "a.txt", "b.md")
    matches = Matches(str(tmp_path), ["*.txt"])
    assert matches.links == matches.broken == matches.unreadable == []
    assert list(matches) == ["a.txt"]
