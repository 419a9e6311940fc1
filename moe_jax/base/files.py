"""Atomic writes, patient reads, locks on folders, and disk errors as one line."""

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from moe_jax.base.errors import UserError

# No space, quota, file too large, read-only file system, no permission (twice), a disk or a
# network file system that fails (three), and a file where a folder should be.
DISK_FAULTS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ENXIO, errno.ESTALE, errno.ENOTDIR),
)
ANSWERS = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors that say what is on the disk. A second try would say the same."""
RETRY_SECONDS = (0.5, 1.0, 2.0, 2.0)
"""Waits before a failed read is tried again."""

Read = TypeVar("Read")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that is whole or absent, also after a crash.

    `content` goes to a temporary file in the same folder, is flushed to disk and renamed into
    place. The folder is created if need be.
    """
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as unfinished, unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, which becomes `path` when the block ends without an error.

    Nobody can know its name beforehand and plant a link there. The block flushes it to disk.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.fchmod(descriptor, 0o644)  # mkstemp's 0600 would hide results from others
        os.close(descriptor)
        yield Path(name)
        os.replace(name, path)  # atomic, because both are in one folder and so on one disk
    except BaseException:  # also KeyboardInterrupt: no temporary file stays behind
        with suppress(OSError):  # the first error is the one to report
            os.unlink(name)
        raise


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of files, to disk."""
    descriptor = os.open(path, os.O_RDONLY)  # Path.open cannot open folders
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def patiently(read: Callable[[], Read]) -> Read:
    """The result of `read`, which is tried again for a few seconds while the disk fails.

    OSError: it still fails, or it says what is on the disk (ANSWERS).
    """
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except ANSWERS:
            raise
        except OSError:
            time.sleep(seconds)
    return read()


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process while the block runs. UserError: another process has it."""
    # "a" leaves the file's content alone. The file stays, because removing it would let a third
    # process lock a new file of the same name. The kernel drops the lock when a process is killed.
    # A link is not followed: in a shared folder somebody else could have planted it.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with open(os.open(folder / ".lock", flags, 0o644), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {folder}: wait for it, or choose another --out"
            ) from None
        yield


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full, failing, read-only or forbidden disk inside the block into a UserError.

    Other errors pass through unchanged.
    """
    try:
        yield
    except UserError:
        raise
    # Every error is looked at, because tensorstore, which Orbax writes with, raises a ValueError
    # with the operating system's words in it.
    except Exception as error:
        code = disk_fault(error)
        if code is None:
            raise
        raise UserError(
            f"cannot write in {folder}: {os.strerror(code)}. Mend that or choose another "
            "--out, then give the same command again. The last complete checkpoint is kept"
        ) from error


def disk_fault(error: BaseException) -> int | None:
    """The error number of a fault of the disk, or None if `error` is about something else."""
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return error.errno
    return next((code for code in DISK_FAULTS if os.strerror(code) in str(error)), None)
