"""Every Markdown file renders: tables are whole, and links and anchors lead somewhere."""

import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest
from markdown_it import MarkdownIt  # rich and jupytext need it, so it is always there
from markdown_it.token import Token

from tests.repository.sources import ROOT, repository_files

PARSER = MarkdownIt("commonmark").enable("table")
CELLS = re.compile(r"(?<!\\)\|")  # also inside backticks: GitHub splits there unless it is escaped
DOCUMENTS = [name for name in repository_files() if name.endswith(".md")]


def tables(tokens: list[Token]) -> Iterator[range]:
    """The lines of each table that the text is rendered with, counted from 0."""
    yield from (range(*token.map) for token in tokens if token.type == "table_open" and token.map)


def code(tokens: list[Token]) -> Iterator[range]:
    """The lines of each block of code."""
    blocks = (token for token in tokens if token.type in ("fence", "code_block"))
    yield from (range(*token.map) for token in blocks if token.map)


def cells(row: str) -> int:
    """Columns of a row that begins and ends with a bar."""
    return len(CELLS.split(row.strip())) - 2


def broken_tables(text: str) -> list[str]:
    """Rows that are not rendered as such, or that have another number of columns than the header.

    A blank line ends a table: the rows after it become a paragraph full of bars.
    """
    tokens = PARSER.parse(text)
    lines = text.split("\n")
    rendered = {n: span[0] for span in tables(tokens) for n in span}
    ignored = {n for span in code(tokens) for n in span}
    broken = []
    for number, line in enumerate(lines):
        if number in rendered:
            if cells(line) != cells(lines[rendered[number]]):
                broken.append(f"line {number + 1} has {cells(line)} columns: {line}")
        elif number not in ignored and line.lstrip().startswith("|"):
            broken.append(f"line {number + 1} is in no table: {line}")
    return broken


def links(text: str) -> Iterator[str]:
    """The targets of all links and pictures."""
    for block in PARSER.parse(text):
        for token in block.children or []:
            target = token.attrGet("href") or token.attrGet("src")
            if target is not None:
                yield str(target)


@cache
def anchors(name: str) -> frozenset[str]:
    """The names that GitHub gives the headings of a document."""
    tokens = PARSER.parse((ROOT / name).read_text())
    headings = [b.content for a, b in pairwise(tokens) if a.type == "heading_open"]
    return frozenset(re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings)


def wrong_links(text: str, name: str) -> Iterator[str]:
    """Links into the repository that lead nowhere from the folder of the file `name`."""
    for target in links(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / name).parent.joinpath(path).resolve() if path else ROOT / name
        found = place.exists()
        if found and anchor:
            found = anchor in anchors(place.relative_to(ROOT).as_posix())
        if not found:
            yield target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_are_whole(name: str):
    assert not broken_tables((ROOT / name).read_text())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str):
    assert not [*wrong_links((ROOT / name).read_text(), name)]


TABLE = "| a | b |\n|---|---|\n| 1 | 2 |\n"


@pytest.mark.parametrize(
    "text",
    [TABLE, f"text\n\n{TABLE}\ntext", "| a |\n|---|\n| `x \\| y` |", f"```\n{TABLE}\n| 3 |\n```"],
)
def test_whole_tables_pass(text: str):
    assert not broken_tables(text)


@pytest.mark.parametrize(
    "text",
    [
        f"{TABLE}\n| 3 | 4 |\n",
        f"{TABLE}| 3 |\n",
        f"{TABLE}| 3 | 4 | 5 |\n",
        f"{TABLE}| `x | y` | 4 |\n",
        "| a | b |\n| 1 | 2 |\n",
        "| a | b |\n|---|\n| 1 | 2 |\n",
    ],
)
def test_broken_tables_are_seen(text: str):
    assert broken_tables(text)


@pytest.mark.parametrize("target", ["no.md", "docs/no.md", "docs/usage.md#no-such", "#no-such"])
def test_wrong_links_are_seen(target: str):
    assert [*wrong_links(f"[text]({target}) and ![picture]({target})", "README.md")]


@pytest.mark.parametrize(
    "target", ["docs/usage.md#settings", "LICENSE", "docs/", "https://no.where"]
)
def test_right_links_pass(target: str):
    assert not [*wrong_links(f"[text]({target})", "README.md")]
