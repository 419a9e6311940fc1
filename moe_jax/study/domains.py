"""Text of three domains from Python's own standard library: code, prose and tables.

Code is its modules without docstrings and comments. Prose is the docstrings. Tables are the
character sets in `encodings`. Nothing is downloaded. The domains differ so much that the popularity
of experts drifts where the text changes from one to the next.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe_jax.base.files import write_atomically
from moe_jax.base.hashes import digest

DOMAINS = ("code", "prose", "tables")
LIMIT = 2_000_000
"""Most characters of a domain's training text. Its held-out text has at most an eighth of that."""
SHORTEST = 500
"""Modules with fewer characters of code or of prose are left out of that domain."""


def write_corpus(out: Path) -> None:
    """out/corpus/DOMAIN/*.txt for training and out/held-out/DOMAIN.txt, unless they are there.

    A text that is held out is in no other file, whatever their names (as data.documents.split).
    corpus.done is written last, so a killed run writes all of it anew.
    """
    if (out / "corpus.done").exists():
        return
    size: dict[str, int] = dict.fromkeys(DOMAINS, 0)
    held_out: dict[str, str] = dict.fromkeys(DOMAINS, "")
    is_held_out: dict[str, bool] = {}  # by the hash of a text: copies go where the first one went
    for name, domain, text in domain_texts():
        has_room = len(held_out[domain]) < LIMIT // 8
        if is_held_out.setdefault(digest(text), has_room):
            held_out[domain] += text if has_room else ""
        elif size[domain] < LIMIT:
            size[domain] += len(text)
            stem = name.replace("/", "-").removesuffix(".py")
            (out / "corpus" / domain).mkdir(parents=True, exist_ok=True)
            (out / "corpus" / domain / f"{stem}.txt").write_text(text)
    for domain, text in held_out.items():
        write_atomically(out / "held-out" / f"{domain}.txt", text[: LIMIT // 8])
    write_atomically(out / "corpus.done", "")


def domain_texts() -> Iterator[tuple[str, str, str]]:
    """(module's file, domain, text) of the whole standard library, in an order by hash.

    The hash mixes packages, so that the held-out text, which comes first, is not one package's.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in library.rglob("*.py") if "site-packages" not in p.parts]
    names = {str(path.relative_to(library)): path for path in paths}
    for name in sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest()):
        for domain, text in _module_texts(name, names[name]):
            yield name, domain, text


def held_out_texts(out: Path, stretch: int, total: int) -> Iterator[tuple[str, str]]:
    """(domain, text) of `stretch` characters, the domains in turn, until `total` or one runs out.

    The corpus must have been written to `out`.
    """
    texts = {domain: (out / "held-out" / f"{domain}.txt").read_text() for domain in DOMAINS}
    for index in range(total // stretch):
        domain = DOMAINS[index % len(DOMAINS)]
        start = index // len(DOMAINS) * stretch
        piece = texts[domain][start : start + stretch]
        if len(piece) < stretch:
            return
        yield domain, piece


def _module_texts(name: str, path: Path) -> Iterator[tuple[str, str]]:
    """(domain, text) of one module. Nothing where it cannot be parsed."""
    try:
        source = path.read_text()
        if name.startswith("encodings/"):
            yield "tables", source
            return
        with warnings.catch_warnings():
            # Old test modules hold invalid escape sequences, of which the parser warns.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
            prose = _take_docstrings(tree)
            # Unparsing drops the comments.
            code = ast.unparse(tree)
    # The library ships files that no parser accepts: its own tests of syntax errors, of encodings
    # and of deep nesting.
    except (SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
        return
    if len(prose) > SHORTEST:
        yield "prose", prose
    if len(code) > SHORTEST:
        yield "code", code


def _take_docstrings(tree: ast.Module) -> str:
    """Removes every docstring from the tree and returns them, a blank line between them."""
    found = []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            found.append(ast.get_docstring(node) or "")
            # A body must not be empty.
            node.body = node.body[1:] or [ast.Pass()]
    return "\n\n".join(found) + "\n"
