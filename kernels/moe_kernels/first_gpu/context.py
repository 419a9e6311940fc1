"""What a step is given, and what it gives back."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Measurement = dict[str, Any]
"""At least name, value and unit. `shape` with `launch`, or with `kind` and `implementation`, say
which prediction it is compared with."""


class Settings(NamedTuple):
    """What all steps of a run share."""

    folder: Path
    """Where files of results go."""
    dry_run: bool = False
    """Tiny sizes in Triton's interpreter, to see that the steps run."""
    layers: tuple[str, ...] = ()
    """Layers of other packages to compare with, each as NAME=MODULE:FUNCTION."""
    plan: str | None = None
    """The plan of all layers, as MODULE:FUNCTION."""
    ladder: Path | None = None
    """The script that climbs the ladder of kernels, or none."""


class Outcome(NamedTuple):
    """What a step found. Its measurements were reported before."""

    ok: bool
    reason: str = ""
    """Why it is not ok, or what it left out."""
    details: dict[str, Any] | None = None
    """JSON that is no measurement."""
    broken: bool = False
    """Whether the process that ran the step may be in a bad state."""


@dataclass(frozen=True)
class Context:
    """A step's settings, its time, and where its measurements go."""

    settings: Settings
    until: float
    """time.monotonic() at which the step should end by itself. Its process is ended a little
    later."""
    report: Callable[[Measurement], None]

    def left(self) -> float:
        """Seconds until the step should end."""
        return self.until - time.monotonic()
