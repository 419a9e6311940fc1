"""The files of the repository, and the prose inside its Python files."""

import ast
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (".ci", "colab", "docs", "experiments", "kernels", "moe_jax", "tests")


@cache
def repository_files() -> tuple[str, ...]:
    """Paths from the root. What a run or a tool writes is not among them."""
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    paths = [*ROOT.glob("*.*"), ROOT / "LICENSE", *below]
    return tuple(
        sorted(
            path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in str(path)
        )
    )


def python_files(*, tests: bool = False) -> list[str]:
    """Python files from the root, with the tests only if asked for."""
    names = [name for name in repository_files() if name.endswith(".py")]
    return [name for name in names if tests or not name.startswith("tests/")]


@cache
def parsed(name: str) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse((ROOT / name).read_text())


def prose(name: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment and docstring, those of fields and constants included."""
    text = (ROOT / name).read_text()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(parsed(name)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(docstring))):
                yield node.lineno, docstring
