"""The command line of a sweep, checked whole: no mistake in it is left for the first trial."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from moe_jax import cli
from moe_jax.base.paths import user_path
from moe_jax.base.provenance import call_of
from moe_jax.base.seeds import check_seed
from moe_jax.config import TrainConfig, require
from moe_jax.study.sweep.axes import Axis, parse_axis

QUICK_TRIALS = 3
QUICK_STEPS = "20"


@dataclass(frozen=True)
class Experiment:
    """A program with a TrainConfig. It takes `PRESET --FIELD VALUE …`, writes DIR/result.json."""

    program: tuple[str, ...]
    """What Python is given before the options."""
    presets: Mapping[str, TrainConfig]


@dataclass(frozen=True)
class SweepConfig:
    """A search for the settings with the lowest objective."""

    search: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FIELD=A,B,C (choices), FIELD=A..B (real), FIELD=int:A..B or FIELD=log:A..B. Repeatable.
    FIELD+FIELD=A+X,B+Y sets fields that depend on each other together."""
    trials: int = 20
    """Number of trials. Trials that an earlier run of the command finished count."""
    out: str = ""
    """Folder of the sweep. Unset, it is runs/sweep-HASH, one folder for each sweep."""
    preset: str = "tiny"
    """Preset of the experiment that every trial starts from."""
    seed: int = 0
    """Seed of the search and of every trial."""
    objective: str = "validation_bits_per_byte"
    """Measurement in the trials' result.json that is minimised."""
    quick: bool = False
    """At most 3 trials, of 20 steps unless --steps says otherwise."""

    def __post_init__(self) -> None:
        require(self.trials > 0, f"trials is {self.trials}: it must be positive")
        check_seed("seed", self.seed)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep of one experiment."""

    name: str
    """Of the experiment."""
    experiment: Experiment
    config: SweepConfig
    axes: tuple[Axis, ...]
    arguments: tuple[str, ...]
    """Options that every trial gets."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that trials must share to be comparable."""
        return {
            "experiment": self.name,
            "arguments": list(self.arguments),
            "search": {axis.field: axis.space for axis in sorted(self.axes, key=lambda a: a.field)},
            "objective": self.config.objective,
        }

    @property
    def size(self) -> int | None:
        """Number of different trials. None: a range of real numbers has no end of them."""
        if all(axis.count is not None for axis in self.axes):
            return math.prod(axis.count or 0 for axis in self.axes)
        return None

    @property
    def out(self) -> Path:
        """The sweep's folder."""
        digest = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:8]
        return user_path(self.config.out or f"runs/sweep-{digest}")

    @property
    def trials(self) -> int:
        """How many trials the sweep has at its end."""
        wanted = min(self.config.trials, QUICK_TRIALS) if self.config.quick else self.config.trials
        # A trial repeats bit for bit, so one that was run already says nothing new.
        return wanted if self.size is None else min(wanted, self.size)

    def trial_arguments(self, params: Mapping[str, Any]) -> list[str]:
        """The options of a trial with these values of the searched fields, without --out."""
        assignments: dict[str, str] = {}
        for axis in self.axes:
            assignments |= axis.assignments(params[axis.field])
        return [*self.arguments, *cli.to_argv(TrainConfig, assignments)]


def parse_sweep(
    argv: list[str], experiments: Mapping[str, Experiment], description: str | None = None
) -> Sweep:
    """Reads `EXPERIMENT [options]`. UserError: any mistake in it. --help prints and exits with 0.

    Options that are not the sweep's own are the experiment's, and go to every trial.
    """
    if cli.asks_for_help(argv):
        cli.parse_settings(
            SweepConfig(), ["--help"], description, prog=f"{call_of('sweep')} EXPERIMENT"
        )
    name = argv[0] if argv else ""
    require(
        name in experiments,
        f"unknown experiment '{name}': start with one of {', '.join(experiments)}",
    )
    own, rest = cli.split(argv[1:], SweepConfig, TrainConfig)
    config = cli.parse_settings(SweepConfig(), own)
    settings = cli.preset(experiments[name].presets, config.preset)
    cli.check(settings, rest)
    require(bool(config.search), "nothing to search: add --search FIELD=A,B,… or FIELD=A..B")
    axes = tuple(parse_axis(text, settings) for text in config.search)
    fields = [field for axis in axes for field in axis.field.split("+")]
    require(
        not any(word.lstrip("-").startswith("processes.") for word in (*rest, *fields)),
        "--processes is for one run: each trial of a sweep is one process, and more of the same "
        "commands share the trials",
    )
    for field in fields:
        require(fields.count(field) == 1, f"--search {field} is given twice: join the values")
    if config.quick and not any(word.startswith("--steps") for word in rest):
        rest += ["--steps", QUICK_STEPS]
    arguments = (config.preset, *rest, "--seed", str(config.seed))
    return Sweep(name, experiments[name], config, axes, arguments)
