"""Files that are whole or absent, and disks that say what is wrong with them."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_jax.base.errors import UserError

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes `content` beside `path`, flushes it to disk and renames it into place."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)  # mkstemp's 0600 would hide results from others
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process. UserError: another process has it."""
    with (folder / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {folder}: wait for it, or choose another --out"
            ) from None
        yield


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full, read-only or forbidden disk inside the block into a UserError.

    Not every library raises an OSError for it (tensorstore, below Orbax, does not), so the text of
    any other error is searched for the operating system's words.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        told = next((c for c in DISK_FAULTS if os.strerror(c) in str(error)), code)
        if told not in DISK_FAULTS:
            raise
        raise UserError(
            f"cannot write in {folder}: {os.strerror(told)}; mend that or choose another --out, "
            "then give the same command again (the last complete checkpoint is kept)"
        ) from error
