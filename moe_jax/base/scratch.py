"""Folders that a program makes for itself and removes again, known by a marker."""

import shutil
from pathlib import Path

from moe_jax.base.errors import require

MARKER = ".moe_jax-scratch"
TEXT = "moe_jax made this folder, and removes it with everything in it.\n"


def is_scratch(folder: Path) -> bool:
    """Whether `make_scratch` or `mark_scratch` made the folder."""
    return (folder / MARKER).is_file()


def mark_scratch(folder: Path) -> None:
    """Makes the folder if need be, and marks it as the program's own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(TEXT)


def make_scratch(folder: Path) -> Path:
    """The folder, marked. What an earlier process left in it stays.

    UserError: it holds files and has no marker, so it belongs to somebody else.
    """
    require(
        is_scratch(folder) or not folder.exists() or not any(folder.iterdir()),
        f"{folder} holds files that moe_jax did not make: move them, or choose another --out",
    )
    if not is_scratch(folder):
        mark_scratch(folder)
    return folder


def remove_scratch(folder: Path) -> None:
    """Removes the folder if it has a marker. Nothing happens without one, or to a link."""
    if folder.is_symlink() or not is_scratch(folder):
        return
    for path in folder.iterdir():
        if path.name != MARKER:
            _remove(path)
    # Last: after a kill on the way the rest is still known as the program's own.
    (folder / MARKER).unlink()
    folder.rmdir()


def remove_scratch_if_empty(folder: Path) -> None:
    """Removes the folder if nothing but a marker is in it."""
    if folder.is_dir() and all(path.name == MARKER for path in folder.iterdir()):
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
