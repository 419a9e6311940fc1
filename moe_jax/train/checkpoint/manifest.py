"""The manifest of a checkpoint: size and hash of every file, and a seal over the list itself.

A file whose bytes were read and do not match is a fault, in words. A file that cannot be read is no
fault of the checkpoint: the read is tried again for some seconds, and then raises OSError.
"""

import json
from pathlib import Path
from typing import Any

from moe_jax.base.files import ANSWERS, patiently, sync, write_atomically
from moe_jax.base.hashes import digest_bytes, digest_file

MANIFEST = "MANIFEST.json"

Entries = dict[str, list[Any]]
"""[size, hash] by the file's path in the checkpoint. MANIFEST itself has [entries, their hash]."""


def files_of(directory: Path) -> list[Path]:
    """All files of a checkpoint except its manifest, links included."""
    paths = [p for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()]
    return sorted(p for p in paths if p != directory / MANIFEST)


def write_manifest(directory: Path) -> None:
    """Flushes every file below `directory` to disk and records it in the file MANIFEST.json."""
    entries: Entries = {}
    for path in files_of(directory):
        sync(path)
        entries[str(path.relative_to(directory))] = [_size(path), digest_file(path)]
    entries[MANIFEST] = _seal(entries)
    write_atomically(directory / MANIFEST, json.dumps(entries, indent=0))
    for folder in {path.parent for path in files_of(directory)} | {directory}:
        sync(folder)


def manifest_fault(directory: Path) -> str | None:
    """The first fault of a checkpoint's files, in words. None if they are as they were written.

    OSError: a file cannot be read.
    """
    try:
        entries = read_manifest(directory)
    except ANSWERS:
        return "its write was not finished"
    except ValueError as error:
        return str(error)
    for name, (size, digest) in entries.items():
        if fault := patiently(lambda n=name, s=size, d=digest: _file_fault(directory, n, s, d)):
            return fault
    return None


def read_manifest(directory: Path) -> Entries:
    """The entries of the files. ValueError: they are damaged. OSError: they cannot be read."""
    content = patiently((directory / MANIFEST).read_bytes)
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError(f"{MANIFEST} is no JSON") from None
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise ValueError(f"{MANIFEST} has another form")
    # Checkpoints of earlier versions have no seal.
    seal = entries.pop(MANIFEST, None)
    if seal is not None and seal != _seal(entries):
        raise ValueError(f"{MANIFEST} has changed")
    if not entries:
        raise ValueError("it is empty")
    return entries


def is_complete(directory: Path) -> bool:
    """Whether the folder is a checkpoint and holds nothing else. The files are not read."""
    try:
        named = {directory / name for name in read_manifest(directory)}
    except (OSError, ValueError):
        return False
    return named == set(files_of(directory))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(part) for part in entry] == [int, str]


def _seal(entries: Entries) -> list[Any]:
    text = json.dumps(entries, sort_keys=True)
    return [len(entries), digest_bytes(text.encode())]


def _size(path: Path) -> int:
    return path.stat().st_size


def _file_fault(directory: Path, name: str, size: int, digest: str) -> str | None:
    path = directory / name
    try:
        found = _size(path)
        # The size first: it finds a file that was cut off without reading it.
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        return None if digest_file(path) == digest else f"{name} has changed"
    except (*ANSWERS, ValueError):
        return f"{name} is missing"  # ValueError: a name with a zero byte
