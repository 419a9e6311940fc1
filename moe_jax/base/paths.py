"""Paths as a person writes them, and files whose size is known before they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_jax.base.errors import UserError, quote, require


def user_path(text: str | Path) -> Path:
    """The path that an argument names, with `~` expanded.

    UserError: there is no such user, or the text holds a NUL.
    """
    require("\0" not in str(text), f"{quote(str(text))} is no path: it holds a NUL")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"no home folder is known for {quote(str(text))}: write the whole path"
        ) from error


def read_file(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    UserError, without the path: it is missing, something else (a device never ends), or longer.
    """
    size = file_size(path)
    require(size <= most, f"{path.name} has {size} bytes, more than {most >> 20} MiB")
    with path.open("rb") as file:
        return file.read(size)


def file_size(path: Path) -> int:
    """Bytes of a regular file. UserError, without the path: it is missing or something else."""
    require(path.exists(), f"{path.name} is missing")
    require(path.is_file(), f"{path.name} is no regular file")
    return path.stat().st_size


@contextmanager
def readable(path: Path, remedy: str, kind: str = "") -> Iterator[Path]:
    """Turns an operating-system error inside the block into one line: kind, path, error, remedy."""
    try:
        yield path
    except OSError as error:
        name = f"{kind} {path}" if kind else str(path)
        raise UserError(f"cannot read {name}: {error.strerror or error} ({remedy})") from error
