"""Atomic writes, locks on folders, and disk errors as one line."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_jax.base.errors import UserError

# No space, quota, file too large, read-only file system, no permission (twice).
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that is whole or absent, also after a crash.

    `content` goes to a temporary file in the same folder, is flushed to disk and renamed into
    place. The folder is created if need be.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)  # mkstemp's 0600 would hide results from others
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)  # atomic, because both are in one folder and so on one disk
    except BaseException:  # also KeyboardInterrupt: no temporary file stays behind
        os.unlink(name)
        raise


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process while the block runs. UserError: another process has it."""
    # "a" leaves the file's content alone. The file stays, because removing it would let a third
    # process lock a new file of the same name. The kernel drops the lock when a process is killed.
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

    Other errors pass through unchanged.
    """
    try:
        yield
    except UserError:
        raise
    # Every error is looked at, because tensorstore, which Orbax writes with, raises a ValueError
    # with the operating system's words in it.
    except Exception as error:
        code = _disk_fault(error)
        if code is None:
            raise
        raise UserError(
            f"cannot write in {folder}: {os.strerror(code)}. Mend that or choose another "
            "--out, then give the same command again. The last complete checkpoint is kept"
        ) from error


def _disk_fault(error: Exception) -> int | None:
    """The error number of a fault of the disk, or None if `error` is about something else."""
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return error.errno
    return next((code for code in DISK_FAULTS if os.strerror(code) in str(error)), None)
