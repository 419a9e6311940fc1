"""Every path and module that the documents, docstrings and comments name exists."""

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import PurePosixPath

import pytest

from tests.repository.sources import ROOT, parsed, prose, python_files, repository_files

ROOTS = ("moe_jax", "moe_kernels", "kernels", "experiments", "docs", "tests", "colab")
# The first form is a file by its name or a path to it. Data files (.json, .png) count only below a
# folder of the repository, because runs write files of such names, too.
FILE = re.compile(r"(?<![\w/.:~@-])(?:[\w.*<>-]+/)*[\w.*<>-]+\.(?:py|md|toml|ipynb|yaml)\b")
BELOW = re.compile(rf"(?<![\w/.:~@-])(?:{'|'.join(ROOTS)})/[\w./*<>-]*[\w/*>]")
MODULE = re.compile(r"(?<![\w/.-])(?:moe_jax|moe_kernels|experiments|tests)(?:\.\w+)+")
COMMAND = re.compile(r"python3? -m ((?:moe_jax|moe_kernels|experiments)[\w.]*\w)")

PLACEHOLDERS = ("DIR", "RUN", "NAME", "PRESET", "FILE", "OWNER")
"""Words of a path that stand for a name of the reader's."""
FOREIGN = {
    "README_WEIGHTS.md",  # DeepSeek-V3's own document
    # Commands by the names under which recorded results were made.
    "lever_hot_cold.py",
    "lever_kernels.py",
}
"""Files that are named but are not here."""


def is_placeholder(token: str) -> bool:
    """Whether a part of the path stands for something else, or lies in the folder of a run."""
    parts = re.split(r"[/.]", token)
    return parts[0] == "runs" or any(part in PLACEHOLDERS or "<" in part for part in parts)


@cache
def folders() -> frozenset[str]:
    """Every folder of the repository, from the root."""
    parents = {parent for name in repository_files() for parent in PurePosixPath(name).parents}
    return frozenset(str(parent) for parent in parents)


@cache
def is_path(token: str) -> bool:
    """Whether some file or folder has this path, or ends in it: `train/loop.py` is enough."""
    # test_markdown.py resolves ../ from the folder of the document. Here the rest must exist.
    token = re.sub(r"^(\.{1,2}/)+", "", token.rstrip("/"))
    everything = [*repository_files(), *folders()]
    return any(fnmatch(path, token) or fnmatch(path, f"*/{token}") for path in everything)


def is_near(token: str, name: str) -> bool:
    """Whether a bare file name is beside or below the file that names it, or in a parent folder."""
    home = PurePosixPath(name).parent
    below = any(
        PurePosixPath(path).is_relative_to(home) and fnmatch(PurePosixPath(path).name, token)
        for path in repository_files()
    )
    above = any((ROOT / parent / token).is_file() for parent in home.parents)
    return below or above


@cache
def names_in(module: str) -> frozenset[str]:
    """What a file defines at its top level or inside its classes, and what it imports."""
    found: set[str] = set()
    for node in ast.walk(parsed(module)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.ImportFrom(names=aliases):
                found.update(alias.asname or alias.name for alias in aliases)
    return frozenset(found)


def is_module(token: str) -> bool:
    """Whether moe_jax.a.b is a module, or a name (and its attribute) inside one."""
    parts = token.split(".")
    home = ["kernels", *parts] if parts[0] == "moe_kernels" else parts
    for length in range(len(home), 0, -1):
        stem = "/".join(home[:length])
        for module in (f"{stem}.py", f"{stem}/__init__.py"):
            if module in repository_files():
                return set(home[length:]) <= names_in(module)
    return False


def wrong_names(text: str, name: str) -> Iterator[str]:
    """Paths and modules in a text of the file `name` that do not exist."""
    paths = [match for pattern in (FILE, BELOW) for match in pattern.findall(text)]
    for token in sorted(set(paths) - FOREIGN):
        if not is_placeholder(token):
            bare = "/" not in token and name.endswith(".py")
            if not (is_near(token, name) if bare else is_path(token)):
                yield token
    yield from (token for token in MODULE.findall(text) if not is_module(token))


DOCUMENTS = [
    name
    for name in repository_files()
    if name.endswith(".md") and name != "CHANGELOG.md"  # it tells of what was
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_what_exists(name: str):
    text = (ROOT / name).read_text()
    assert not [*wrong_names(text, name)]


def test_docstrings_and_comments_name_what_exists():
    wrong = [
        f"{name}:{line} {token}"
        for name in python_files(tests=True)
        if not name.startswith("tests/repository/")
        for line, text in prose(name)
        for token in wrong_names(text, name)
    ]
    assert not wrong, "\n".join(wrong)


def is_program(module: str) -> bool:
    """Whether `python -m` can run it."""
    stem = module.replace(".", "/").replace("moe_kernels", "kernels/moe_kernels")
    program = ROOT / f"{stem}.py"
    as_file = program.is_file() and "__main__" in program.read_text()
    return as_file or (ROOT / stem / "__main__.py").is_file()


def test_commands_name_programs():
    """Of `python -m`, in documents, docstrings, comments and the checks themselves."""
    texts = [(ROOT / name).read_text() for name in [*DOCUMENTS, ".ci/run"]]
    texts += [text for name in python_files() for _, text in prose(name)]
    modules = {module for text in texts for module in COMMAND.findall(text)}
    assert "moe_kernels.soak" in modules
    assert not [module for module in modules if not is_program(module)]


@pytest.mark.parametrize(
    "text",
    [
        "see train/loop.py",
        "`moe_jax/model/` and kernels/moe_kernels/gate/",
        "python experiments/train.py --out runs/first",
        "DIR/result.json and runs/first/plots/load.png",
        "moe_jax.train.loop.train, moe_kernels.gate",
        "https://github.com/someone/other/blob/main/file.py",
    ],
)
def test_right_names_pass(text: str):
    assert not [*wrong_names(text, "README.md")]


@pytest.mark.parametrize(
    "text",
    ["moe_jax/trainer/", "experiments/nothing.py", "moe_jax.no_such", "moe_kernels.gate.no_such",
     "no_such_file.py", "docs/no_such.png"],
)  # fmt: skip
def test_wrong_names_fail(text: str):
    assert [*wrong_names(f"see {text}, which", "README.md")]
