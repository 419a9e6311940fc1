"""Hashes of content: 128 bits of blake2b, in hexadecimal.

They are in names of files, in manifests and in checkpoints. So what they give must stay the same.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

BYTES = 16
"""Of a hash, before it is written in hexadecimal."""


def hasher() -> "hashlib.blake2b":
    """The hash of bytes that come in parts: `update`, then `digest` or `hexdigest`."""
    return hashlib.blake2b(digest_size=BYTES)


def digest_bytes(content: bytes) -> str:
    """Hash of bytes."""
    return hashlib.blake2b(content, digest_size=BYTES).hexdigest()


def digest_file(path: Path) -> str:
    """Hash of a file's bytes. OSError: it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, hasher).hexdigest()


def digest(*parts: str) -> str:
    """Hash of a sequence of strings."""
    return digest_all(parts)


def digest_all(parts: Iterable[str]) -> str:
    """`digest` of strings that need not be in memory together."""
    state = hasher()
    for part in parts:
        # File names that are no UTF-8 reach Python with surrogates for their bytes.
        data = part.encode("utf-8", "surrogateescape")
        # With the lengths, ("ab", "c") and ("a", "bc") differ.
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()
