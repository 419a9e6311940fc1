"""Where a result comes from: version, commit, command line, date and duration."""

import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import moe_jax

ROOT = Path(moe_jax.__file__).resolve().parents[1]
"""Folder of the package. In a checkout it is the checkout's root."""
PROGRAM = "moe-jax"
"""The console command that pyproject.toml declares."""
BEGAN = time.monotonic()
"""When this module was imported, which every program does at its start."""


def provenance() -> dict[str, Any]:
    """The origin of a result that is written now, for result.json. All of it is of this process.

    `duration_seconds` counts from the start of the process. A run that was continued has the time
    of all its processes in metrics.jsonl.
    """
    return {
        "version": moe_jax.__version__,
        "commit": commit(),
        "command": shlex.join([*called_as(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_seconds": round(time.monotonic() - BEGAN, 1),
    }


def called_as() -> list[str]:
    """This process's program as a user calls it: `python` and a script, or `moe-jax`."""
    own = Path(sys.argv[0]).name in (PROGRAM, "__main__.py")  # python -m moe_jax
    return [PROGRAM] if own else ["python", sys.argv[0]]


def call_of(command: str) -> str:
    """How a user of this installation calls a command of moe_jax/__main__.py.

    In a checkout it is `python experiments/train.py`, elsewhere `moe-jax train`.
    """
    script = Path("experiments", f"{command.replace('-', '_')}.py")
    return f"python {script}" if (ROOT / script).is_file() else f"{PROGRAM} {command}"


@cache
def commit() -> str | None:
    """The checkout's commit, with "-dirty" where tracked files were changed.

    None: the package is not in a checkout of its own, or git cannot read it. It is remembered from
    the first call, because files may change while a program runs.
    """
    if not (ROOT / ".git").exists():  # an installed package may lie inside another repository
        return None
    # Both are named, because GIT_DIR and GIT_WORK_TREE of the environment may be another's.
    here = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run([*here, *describe], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
