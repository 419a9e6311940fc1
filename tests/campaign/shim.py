"""Faults of the disk for programs that are started with the library that is built from faults.c.

The library stands between a program and the C library. So its errors reach every library of the
program alike: Python, the checkpoint library's own threads, and NumPy.
"""

import errno
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")

READ_ERRORS = (errno.EIO, errno.ESTALE, errno.EACCES)
WRITE_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE)
NAME_ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE)
ERRORS = {
    "open": READ_ERRORS,
    "read": READ_ERRORS[:2],
    "stat": READ_ERRORS,
    "list": READ_ERRORS,
    "write": WRITE_ERRORS,
    "sync": WRITE_ERRORS,
    "mkdir": NAME_ERRORS,
    "rename": NAME_ERRORS,
    "unlink": (errno.EIO, errno.EACCES, errno.ESTALE),
}
"""The groups of calls of faults.c, and the errors that each may get."""


def build(folder: Path) -> Path | None:
    """Compiles faults.c. None: there is no compiler, or not for this system."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "faults.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(command, capture_output=True, check=False)
    return library if done.returncode == 0 else None


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a process. The fields are the settings of faults.c."""

    path: str
    calls: str = ""
    after: int | None = None
    times: int | None = None
    seconds: float | None = None
    errno: int | None = None
    signal: int | None = None
    torn: int | None = None
    log: str | None = None

    def environment(self) -> dict[str, str]:
        """The environment variables that faults.c reads."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {f"FAULT_{name.upper()}": str(value) for name, value in given.items()}

    def __str__(self) -> str:
        given = {name: v for name, v in vars(self).items() if v not in (None, "")}
        if self.errno is not None:
            given["errno"] = errno.errorcode[self.errno]
        return " ".join(f"{name}={value}" for name, value in given.items())


@dataclass(frozen=True)
class Call:
    """A line of FAULT_LOG."""

    group: str
    path: str
    library: str
    fault: bool


def read_log(path: Path) -> list[Call]:
    """The watched calls of a process, in order."""
    if not path.exists():
        return []
    rows = [line.split("\t") for line in path.read_text(errors="replace").splitlines()]
    return [Call(row[0], row[1], Path(row[2]).name, row[3] == "fault") for row in rows]
