"""The axes in jaxtyping annotations are letters of moe_jax/base/letters.py, or known words."""

import ast
import re
from collections.abc import Iterator

import pytest

from moe_jax.base.letters import LETTERS
from tests.repository.sources import ROOT, parsed, python_files

DTYPES = {"Float", "Int", "Bool", "UInt8", "Int8", "UInt", "Shaped", "Num", "Key"}
WORDS = {
    *("n", "m", "count", "parts", "twoF"),  # twoF: gate and up side by side, 2F columns
    *("layers", "experts", "slots", "active", "hits", "misses", "keep"),
    *("rows", "columns", "blocks", "query_blocks", "key_blocks", "tiles", "n_tiles", "d_tiles"),
    *("keys", "heads", "kv_heads", "head_dim", "value_dim", "rope_dim", "kv_rank", "pairs"),
    *("inputs", "outputs", "teacher_width", "prompts", "classes", "buckets", "bytes"),
    *("batch", "shape", "copies", "ticks", "windows", "replicas", "domains"),
}
"""Axes without a letter, each with the meaning that it has everywhere."""
# `*` before a name stands for several axes and `#` for one that broadcasts. `L+1` is an expression.
PARTS = re.compile(r"[+\-*/#]")


def axes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, axis) of every Float[Array, "B L"] and its like."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(
                value=ast.Name(id=dtype),
                slice=ast.Tuple(elts=[_, ast.Constant(value=str(shape))]),
            ) if dtype in DTYPES:
                yield from ((node.lineno, axis) for axis in shape.split())


def is_known(axis: str) -> bool:
    """A letter, a word, a number, a sum or product of these, or jaxtyping's own `...` and `_`."""
    if axis in ("...", "_"):
        return True
    parts = PARTS.split(axis.lstrip("*#"))
    return all(part in LETTERS or part in WORDS or part.isdigit() for part in parts)


def test_every_axis_is_known():
    names = [name for name in python_files() if not name.startswith((".ci", "colab"))]
    found = [(f"{name}:{line}", axis) for name in names for line, axis in axes(parsed(name))]
    assert len(found) > 500, "the annotations are no longer found"
    unknown = [f"{place} {axis}" for place, axis in found if not is_known(axis)]
    assert not unknown, unknown


def test_no_word_of_the_list_is_unused():
    found = [axis for name in python_files() for _, axis in axes(parsed(name))]
    used = {part for axis in found for part in PARTS.split(axis)}
    assert used >= WORDS, WORDS - used


@pytest.mark.parametrize("axis", ["B", "#B", "*batch", "...", "_", "1", "L+1", "twoF"])
def test_known_axes(axis):
    assert is_known(axis)


@pytest.mark.parametrize("axis", ["Z", "*Z", "L+Z", "b", ""])
def test_unknown_axes(axis):
    assert not is_known(axis)


def test_readme_gives_the_letters_in_the_same_words():
    """README has them in one passage: B batch · L length · T = B·L tokens · …"""
    text = " ".join((ROOT / "README.md").read_text().split())
    passage = text[text.index("Letters") :][:1000]
    for letter in "BLTDHEKFSV":  # the letters of the mixture and its model
        pattern = rf"\b{letter}\b\W+{re.escape(LETTERS[letter])}"
        assert re.search(pattern, passage), f"{letter}: {LETTERS[letter]}"
