"""The command line of a sweep, checked whole: no mistake in it is left for the first trial."""

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tyro

from moe_jax import cli
from moe_jax.base.errors import UserError
from moe_jax.base.paths import user_path
from moe_jax.base.provenance import call_of
from moe_jax.base.seeds import check_seed
from moe_jax.config import TrainConfig, require
from moe_jax.study.sweep.axes import Axis, parse_axis
from moe_jax.study.sweep.objectives import Objective, parse_objectives

TRIALS = 20
QUICK_TRIALS = 3
QUICK_STEPS = "20"
DRIVER = "postgresql+psycopg"


@dataclass(frozen=True)
class Experiment:
    """A program that takes `--FIELD VALUE …` for the fields of `settings`.

    It writes DIR/result.json for `--out DIR`.
    """

    program: tuple[str, ...]
    """What Python is given before the options."""
    call: str
    """How a user calls it."""
    settings: Any
    """An instance of its settings with their defaults."""
    presets: Mapping[str, TrainConfig] = field(default_factory=dict)
    """Named settings, if its first word is a preset."""


@dataclass(frozen=True)
class SweepConfig:
    """A search for the settings with the best objectives."""

    search: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FIELD=A,B,C (choices), FIELD=A..B (real), FIELD=int:A..B or FIELD=log:A..B. Repeatable.
    FIELD+FIELD=A+X,B+Y sets fields that depend on each other together."""
    trials: int | None = None
    """Number of trials. Trials that an earlier run of the command finished count.
    Unset: 20, or every combination with --sampler grid."""
    out: str = ""
    """Folder of the sweep. Unset, it is runs/sweep-HASH, one folder for each sweep."""
    preset: str = "tiny"
    """Preset of the experiment that every trial starts from."""
    seed: int = 0
    """Seed of the search and of every trial."""
    objective: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Measurement in the trials' result.json that is minimised, or max:NAME that is maximised.
    Given more than once, the sweep looks for the Pareto front. Unset: validation_bits_per_byte."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """tpe learns from the trials before. grid takes the combinations in their order."""
    pruner: Literal["none", "median", "halving"] = "none"
    """Ends trials early whose objective is behind, as metrics.jsonl reports it. median compares
    with the median of other trials at the same step, halving keeps the best quarter at each rung.
    """
    storage: str = ""
    """postgresql://HOST/DATABASE that workers on any machine share. Unset: a file in --out."""
    study: str = ""
    """Name of the sweep in --storage. Unset: sweep-HASH, one for each sweep."""
    dashboard: bool = False
    """Shows the sweep in Optuna's dashboard, and runs no trial."""
    quick: bool = False
    """At most 3 trials, of 20 steps unless --steps says otherwise."""

    def __post_init__(self) -> None:
        require(
            self.trials is None or self.trials > 0,
            f"trials is {self.trials}: it must be positive",
        )
        check_seed("seed", self.seed)
        count = len(parse_objectives(self.objective))
        require(
            self.pruner == "none" or count < 2,
            f"pruner={self.pruner} compares one objective, and {count} are given: unset it",
        )
        require(self.study == "" or self.storage != "", "--study needs --storage")
        self._check_storage()

    def _check_storage(self) -> None:
        if not self.storage:
            return
        kind, separator, rest = self.storage.partition("://")
        require(
            separator != "" and kind in ("postgresql", "postgres", DRIVER),
            f"--storage '{self.storage}' is no address of a PostgreSQL database: write "
            "postgresql://USER@HOST/DATABASE, or unset it for a file in --out",
        )
        user, at, _ = rest.partition("@")
        require(
            at == "" or ":" not in user,
            "--storage holds a password, which other users could see: put it into PGPASSWORD or "
            "~/.pgpass, and leave it out of the address",
        )

    @property
    def database(self) -> str:
        """The address of --storage with the driver that is used. Empty: there is none."""
        return f"{DRIVER}://{self.storage.partition('://')[2]}" if self.storage else ""


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

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """What is minimised or maximised, at least one."""
        return parse_objectives(self.config.objective or ("validation_bits_per_byte",))

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that trials must share to be comparable."""
        return {
            "experiment": self.name,
            "arguments": list(self.arguments),
            "search": {axis.field: axis.space for axis in sorted(self.axes, key=lambda a: a.field)},
            "objective": " ".join(objective.text for objective in self.objectives),
        }

    @property
    def size(self) -> int | None:
        """Number of different trials. None: a range of real numbers has no end of them."""
        if all(axis.count is not None for axis in self.axes):
            return math.prod(axis.count or 0 for axis in self.axes)
        return None

    @property
    def default_name(self) -> str:
        """sweep-HASH, from everything that its trials share."""
        return f"sweep-{hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:8]}"

    @property
    def study(self) -> str:
        """Name of the Optuna study. A file holds one sweep, a database may hold many."""
        return (self.config.study or self.default_name) if self.config.storage else "sweep"

    @property
    def out(self) -> Path:
        """The sweep's folder."""
        return user_path(self.config.out or f"runs/{self.default_name}")

    @property
    def trials(self) -> int:
        """How many trials the sweep has at its end."""
        wanted = self.config.trials
        if wanted is None:
            wanted = (self.size if self.config.sampler == "grid" else None) or TRIALS
        wanted = min(wanted, QUICK_TRIALS) if self.config.quick else wanted
        # A trial repeats bit for bit, so one that was run already says nothing new.
        return wanted if self.size is None else min(wanted, self.size)

    def trial_arguments(self, params: Mapping[str, Any]) -> list[str]:
        """The options of a trial with these values of the searched fields, without --out."""
        assignments: dict[str, str] = {}
        for axis in self.axes:
            assignments |= axis.assignments(params[axis.field])
        return [*self.arguments, *cli.to_argv(type(self.experiment.settings), assignments)]

    def command_line(self, params: Mapping[str, Any]) -> str:
        """A trial as a command of its own, without its folder."""
        arguments = self.trial_arguments(params)
        presets = self.experiment.presets
        if not presets:
            return f"{self.experiment.call} {shlex.join(arguments)}"
        config = cli.parse(arguments, presets)
        return cli.command_line(config, presets[config.preset], self.experiment.call)


def parse_sweep(argv: list[str], find: Any, description: str | None = None) -> Sweep:
    """Reads `EXPERIMENT [options]`. UserError: any mistake in it. --help prints and exits with 0.

    `find(name)` gives the experiment. Options that are not the sweep's own are the experiment's,
    and go to every trial.
    """
    if cli.asks_for_help(argv):
        program = f"{call_of('sweep')} EXPERIMENT"
        cli.parse_settings(SweepConfig(), ["--help"], description, prog=program)
    name = argv[0] if argv else ""
    experiment = find(name)
    own, rest = cli.split(argv[1:], SweepConfig, type(experiment.settings))
    config = cli.parse_settings(SweepConfig(), own)
    if experiment.presets:
        settings = cli.preset(experiment.presets, config.preset)
    else:
        settings = experiment.settings
    cli.check(settings, rest)
    axes = parse_axes(config, settings, rest)
    arguments = trial_options(experiment, config, own, rest)
    sweep = Sweep(name, experiment, config, axes, arguments)
    if config.sampler == "grid" and sweep.size is None:
        endless = next(axis.field for axis in axes if axis.count is None)
        raise UserError(
            f"--sampler grid: {endless} is a range of real numbers, which has no end of values: "
            "write its values, or take another sampler"
        )
    return sweep


def parse_axes(config: SweepConfig, settings: Any, rest: list[str]) -> tuple[Axis, ...]:
    """What is searched. UserError: nothing, or something that a sweep cannot search."""
    require(bool(config.search), "nothing to search: add --search FIELD=A,B,… or FIELD=A..B")
    axes = tuple(parse_axis(text, settings) for text in config.search)
    fields = [name for axis in axes for name in axis.field.split("+")]
    require(
        not any(word.lstrip("-").startswith("processes.") for word in (*rest, *fields)),
        "--processes is for one run: each trial of a sweep is one process, and more of the same "
        "commands share the trials",
    )
    for name in fields:
        require(fields.count(name) == 1, f"--search {name} is given twice: join the values")
    return axes


def trial_options(
    experiment: Experiment, config: SweepConfig, own: list[str], rest: list[str]
) -> tuple[str, ...]:
    """The options that every trial gets, before its values of the searched fields."""
    known = cli.types(type(experiment.settings))
    if experiment.presets:
        quick = config.quick and not any(word.startswith("--steps") for word in rest)
        steps = ["--steps", QUICK_STEPS] if quick else []
        return (config.preset, *rest, *steps, "--seed", str(config.seed))
    # What the sweep and the experiment both have is given to both.
    options = ["--quick"] if config.quick and "quick" in known else []
    if "preset" in known and any(word.startswith("--preset") for word in own):
        options += ["--preset", config.preset]
    if "seed" in known:
        options += ["--seed", str(config.seed)]
    return (*rest, *options)
