"""What can happen to a run: a function a kind, which makes a trial and checks its outcome."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.campaign.bench import Bench
from tests.campaign.kinds import (
    complete,
    damage,
    disk,
    kill,
    mutate,
    own,
    paths,
    refuse,
    signals,
    sweep,
    together,
)


class Kind(NamedTuple):
    """A kind of trial."""

    trial: Callable[[Bench, random.Random, Path, int], int | None]
    """(bench, random numbers, folder of the trial, its number) -> how many inputs it tried, one
    if it returns None. AssertionError or TimeoutError: an invariant does not hold."""
    share: float = 1.0
    """Of the campaign's time, relative to the others."""
    needs: str = ""
    """"compiler" or "mount"."""


KINDS = {
    "kill": Kind(kill.trial, share=2.0),
    "damage": Kind(damage.trial, share=2.0),
    "errors": Kind(disk.trial_errors, share=2.0, needs="compiler"),
    "full": Kind(disk.trial_full, needs="mount"),
    "signal": Kind(signals.trial),
    "refuse": Kind(refuse.trial),
    "paths": Kind(paths.trial),
    "own": Kind(own.trial, share=0.5),
    "together": Kind(together.trial, share=0.5),
    "complete": Kind(complete.trial),
    "sweep": Kind(sweep.trial),
    "mutate": Kind(mutate.trial),
}
