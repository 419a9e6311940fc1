"""One candidate: experiments/predict.py as a process of its own, and what came of it.

A compiler that ends its process ends no search. A candidate has a folder, named by all that its
numbers depend on. So a search that is started again reads what it has, after a kill as well.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moe_jax.base.errors import brief
from moe_jax.base.files import write_atomically
from moe_jax.base.result import Measurement
from moe_jax.predict.layouts.fsdp import Update
from moe_jax.study.layout_search.candidates import Candidate
from moe_jax.study.results import read_measurements

State = Literal["compiled", "too large", "refused", "failed", "not tried"]
REFUSED = 2
"""Exit code of a program that refuses its settings (moe_jax.cli.program)."""
REASON = "failure.json"
UNKNOWN = Update(0.0, 0.0)


@dataclass(frozen=True)
class Try:
    """A candidate, and what is known of it."""

    candidate: Candidate
    state: State
    least: int = 0
    """Bytes that it needs at least."""
    rough: Update = UNKNOWN
    """By formula."""
    line: str = ""
    """Why it has no numbers."""
    rows: dict[str, Measurement] | None = None
    """Of its result.json."""

    def value(self, name: str) -> float:
        """A measurement of one that was compiled."""
        assert self.rows is not None
        value = self.rows[name].value
        assert value is not None
        return value

    @property
    def interval(self) -> tuple[float, float]:
        """Of the seconds of one that was compiled."""
        assert self.rows is not None
        bounds = self.rows["step_seconds"].interval
        assert bounds is not None
        return bounds[0], bounds[1]

    @property
    def fits(self) -> bool:
        """Whether it was compiled and fits."""
        return self.rows is not None and self.value("fits") == 1


def finished(planned: Try, folder: Path) -> Try | None:
    """What an earlier process left in the candidate's folder. None: nothing that can be read."""
    try:
        if (folder / REASON).is_file():
            known = json.loads((folder / REASON).read_text())
            return replace(planned, state=known["state"], line=known["line"])
        rows = read_measurements(folder / "result.json")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return replace(planned, state="compiled", rows=rows)


def compile_one(planned: Try, folder: Path, command: list[str], seconds: float) -> Try | None:
    """Runs `command` for the candidate, for so long at the most. None: there was no time.

    Why it failed is kept, so that it is not tried again.
    """
    try:
        done = subprocess.run(
            [sys.executable, *command, "--out", str(folder)],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        line = _reason(done.returncode, done.stderr)
        state = "refused" if done.returncode == REFUSED else "failed"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / REASON, json.dumps({"state": state, "line": line}))
    return finished(planned, folder)


def _reason(code: int, errors: str) -> str:
    last = (errors.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
    return brief(last) if code == REFUSED else f"it ended with {code}: {brief(last)}"
