"""Locks that end with their owner, however it ended: of files, and of a PostgreSQL database.

A worker holds the lock of its trial in both. The file's lock is inherited by the training run, so
that a folder never has two writers. The database's lock is seen by workers on other machines.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moe_jax.base.errors import UserError, brief

KEEPALIVE = "SET tcp_keepalives_idle=20; SET tcp_keepalives_interval=10; SET tcp_keepalives_count=3"
"""Within a minute the server drops a worker whose machine is gone, and with it the locks."""


class Held:
    """A lock that is held until the block ends, or the process does."""

    def __init__(self, file: IO[bytes], session: Any = None) -> None:
        self._file = file
        self._session = session

    def fileno(self) -> int:
        """The descriptor of the file, for a child process that is to hold its lock as well."""
        return self._file.fileno()

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()
        if self._session is not None:
            self._session.close()


def take(path: Path) -> IO[bytes]:
    """Takes an exclusive lock, which ends with the last process that has the file open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # flock and not lockf: the lock belongs to the open file, which child processes inherit, and
    # not to the process.
    file = path.open("ab")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def try_take(path: Path) -> IO[bytes] | None:
    """As take, but None if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


class FolderLocks:
    """Locks of a sweep whose workers share its folder."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def sweep(self) -> Held:
        """The lock of the whole sweep, waited for."""
        return Held(take(self.out / "sweep.lock"))

    def trial(self, folder: str) -> Held:
        """The lock of a new trial."""
        return Held(take(self.out / folder / "lock"))

    def try_trial(self, folder: str) -> Held | None:
        """The lock of a trial. None: its worker or its training run still has it."""
        file = try_take(self.out / folder / "lock")
        return None if file is None else Held(file)


class DatabaseLocks(FolderLocks):
    """Locks of a sweep whose workers share a database, and perhaps a folder.

    Each lock is a PostgreSQL advisory lock of a connection of its own, which ends with it.
    """

    def __init__(self, out: Path, engine: Any, study: str) -> None:
        super().__init__(out)
        self._engine = engine
        self._study = study

    def sweep(self) -> Held:
        session = self._session("sweep", "pg_advisory_lock")
        assert session is not None
        return Held(take(self.out / "sweep.lock"), session)

    def trial(self, folder: str) -> Held:
        session = self._session(folder, "pg_advisory_lock")
        assert session is not None
        return Held(take(self.out / folder / "lock"), session)

    def try_trial(self, folder: str) -> Held | None:
        session = self._session(folder, "pg_try_advisory_lock")
        if session is None:
            return None
        file = try_take(self.out / folder / "lock")
        if file is None:
            session.close()
            return None
        return Held(file, session)

    def _session(self, name: str, function: str) -> Any:
        """A connection that has the lock. None: another one has it."""
        from sqlalchemy import text

        session = self._engine.connect()
        session.execute(text(KEEPALIVE))
        call = text(f"SELECT {function}(hashtextextended(:name, 0))")
        if session.execute(call, {"name": f"{self._study}/{name}"}).scalar() is False:
            session.close()
            return None
        return session


@contextmanager
def database_errors(storage: str) -> Iterator[None]:
    """Turns an error of the database inside the block into one line."""
    try:
        yield
    except Exception as error:
        # Optuna wraps SQLAlchemy's errors, and SQLAlchemy those of the driver.
        chain = [error, error.__cause__, getattr(error.__cause__, "orig", None)]
        if not any(type(link).__module__.startswith(("sqlalchemy", "psycopg")) for link in chain):
            raise
        orig = getattr(error, "orig", None) or chain[2] or error
        raise UserError(
            f"--storage {storage}: {brief(str(orig).strip().splitlines()[-1])} (what the database "
            "has is kept, the same command continues)"
        ) from error
