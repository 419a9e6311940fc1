"""Which settings of an experiment are best? A hyper-parameter search over any of its fields.

python experiments/sweep.py train --search model.moe.experts=8,16 \\
    --search optim.learning-rate=log:1e-4..1e-2 --trials 20 --steps 100

Every trial is a run of the experiment with its own folder DIR/trial-NNNN. Options that are not the
sweep's own go to every trial. The same command continues a sweep up to its number of trials; more
workers are more such commands with the same --out.
"""

import csv
import fcntl
import hashlib
import importlib.util
import io
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, get_args

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_jax import cli
from moe_jax.base.errors import UserError
from moe_jax.base.files import write_atomically
from moe_jax.config import TrainConfig, require
from moe_jax.config.presets import PRESETS


@dataclass(frozen=True)
class Experiment:
    """A script with a TrainConfig: takes `PRESET --FIELD VALUE …`, writes DIR/result.json."""

    script: Path
    presets: Mapping[str, TrainConfig]


EXPERIMENTS = {"train": Experiment(Path(__file__).with_name("train.py"), PRESETS)}
QUICK_TRIALS, QUICK_STEPS = 3, "20"


@dataclass(frozen=True)
class SweepConfig:
    """A search for the settings with the lowest objective."""

    search: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FIELD=A,B,C (choices), FIELD=A..B (real), FIELD=int:A..B or FIELD=log:A..B; repeatable."""
    trials: int = 20
    """Trials in all; those that an earlier run of the command finished count."""
    out: str = ""
    """Folder of the sweep; unset, runs/sweep-HASH, one folder for each sweep."""
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
        require(self.seed >= 0, f"seed is {self.seed}: it must not be negative")


@dataclass(frozen=True)
class Axis:
    """One searched field: `choices`, or a range from low to high."""

    field: str
    space: str
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    def distribution(self) -> Any:
        from optuna import distributions

        if self.choices:
            return distributions.CategoricalDistribution(self.choices)
        if isinstance(self.low, int):
            return distributions.IntDistribution(self.low, int(self.high), log=self.log)
        return distributions.FloatDistribution(self.low, self.high, log=self.log)


def parse_axis(text: str, config: TrainConfig) -> Axis:
    """Reads `FIELD=SPACE`. UserError: bad syntax, unknown field, or values of the wrong type."""
    name, _, space = text.partition("=")
    name = name.replace("-", "_")
    require(name != "out", f"--search '{text}': the sweep gives every trial its own out folder")
    require(
        name != "" and space != "", f"--search '{text}': write FIELD=A,B,… or FIELD=[int:|log:]A..B"
    )
    cli.to_argv(type(config), {name: "true"})  # raises for an unknown field
    hint = cli.types(type(config))[name]
    numeric = {hint, *get_args(hint)} & {int, float}
    if numeric and (":" in space or ".." in space):
        return _range(name, space, numeric.pop())
    choices = tuple(dict.fromkeys(space.split(",")))
    for choice in choices:
        cli.check(config, cli.to_argv(type(config), {name: choice}))
    return Axis(name, space, choices)


def _range(name: str, space: str, kind: type) -> Axis:
    where = f"--search {name}={space}"
    match = re.fullmatch(r"(?:(int|log):)?([^:]+?)\.\.([^:]+)", space)
    if match is None:
        raise UserError(f"{where}: write a range as A..B, int:A..B or log:A..B")
    prefix, *bounds = match.groups()
    written = "..".join(bounds)
    require(
        prefix is not None or kind is float,
        f"{where}: {name} is an int, so write int:{written} (or log:{written})",
    )
    number = int if prefix == "int" else kind
    try:
        low, high = map(number, bounds)
    except ValueError:
        raise UserError(f"{where}: '{written}' is not a pair of {number.__name__}s") from None
    require(math.isfinite(low) and low < high < math.inf, f"{where}: {low} is not below {high}")
    require(prefix != "log" or low > 0, f"{where}: a log range starts above 0, not at {low}")
    return Axis(name, space, low=low, high=high, log=prefix == "log")


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: nothing in it can fail before the first trial runs."""

    name: str
    config: SweepConfig
    axes: tuple[Axis, ...]
    arguments: tuple[str, ...]
    """What every trial of the experiment gets."""

    @property
    def experiment(self) -> Experiment:
        return EXPERIMENTS[self.name]

    @property
    def identity(self) -> dict[str, Any]:
        """What trials must share to be comparable."""
        return {
            "experiment": self.name,
            "arguments": list(self.arguments),
            "search": {axis.field: axis.space for axis in sorted(self.axes, key=lambda a: a.field)},
            "objective": self.config.objective,
        }

    @property
    def out(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:8]
        return Path(self.config.out or f"runs/sweep-{digest}").expanduser()

    @property
    def trials(self) -> int:
        return min(self.config.trials, QUICK_TRIALS) if self.config.quick else self.config.trials

    def trial_arguments(self, params: Mapping[str, Any]) -> list[str]:
        assignments = {name: str(value) for name, value in params.items()}
        return [*self.arguments, *cli.to_argv(TrainConfig, assignments)]


def parse(argv: list[str]) -> Sweep:
    """Reads `EXPERIMENT [options]`; every mistake in it is a UserError."""
    if cli.asks_for_help(argv):
        cli.parse_settings(SweepConfig(), ["--help"], __doc__, prog="sweep.py EXPERIMENT")
    name = argv[0] if argv else ""
    require(
        name in EXPERIMENTS,
        f"unknown experiment '{name}': start with one of {', '.join(EXPERIMENTS)}",
    )
    own, rest = cli.split(argv[1:], SweepConfig, TrainConfig)
    config = cli.parse_settings(SweepConfig(), own)
    settings = cli.preset(EXPERIMENTS[name].presets, config.preset)
    cli.check(settings, rest)
    require(bool(config.search), "nothing to search: add --search FIELD=A,B,… or FIELD=A..B")
    axes = tuple(parse_axis(text, settings) for text in config.search)
    fields = [axis.field for axis in axes]
    for field in fields:
        require(fields.count(field) == 1, f"--search {field} is given twice: join the values")
    if config.quick and not any(word.startswith("--steps") for word in rest):
        rest += ["--steps", QUICK_STEPS]
    return Sweep(name, config, axes, (config.preset, *rest, "--seed", str(config.seed)))


def lock(path: Path) -> IO[bytes]:
    """Takes an exclusive lock, which ends with the last process that has the file open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def try_lock(path: Path) -> IO[bytes] | None:
    """As lock, or None if somebody has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def open_study(sweep: Sweep) -> Any:
    """The Optuna study in DIR/journal.log. UserError: the folder holds a different sweep."""
    import optuna
    from optuna.storages import JournalStorage, journal

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out '{sweep.out}' cannot be used: {error.strerror}") from None
    with lock(sweep.out / "sweep.lock"):
        storage = JournalStorage(journal.JournalFileBackend(str(sweep.out / "journal.log")))
        study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True)
        there = study.user_attrs.get("sweep")
        if there is None:
            study.set_user_attr("sweep", sweep.identity)
        elif there != sweep.identity:
            key = next(k for k in there if there[k] != sweep.identity[k])
            raise UserError(
                f"{sweep.out} holds a sweep with {key} {_short(there[key])}, not "
                f"{_short(sweep.identity[key])}: use another --out, or the command that began it"
            )
    return study


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={v}" for name, v in value.items())
    return f"'{' '.join(value) if isinstance(value, list) else value}'"


def claim(study: Any, sweep: Sweep) -> tuple[Any, IO[bytes]] | None:
    """The next trial, with its folder locked; None if every trial is finished or running.

    One worker at a time is in here, so that together they run exactly the number asked for.
    """
    import optuna

    with lock(sweep.out / "sweep.lock"):
        recover(study, sweep.out)
        taken = len(finished(study)) + len(running(study))
        if taken >= sweep.trials:
            return None
        # A sampler of its own for every trial: one that is made anew when the command continues
        # would repeat its first draws.
        seed = (sweep.config.seed * 100_003 + taken) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = study.ask({axis.field: axis.distribution() for axis in sweep.axes})
        trial.set_user_attr("folder", folder(trial))
        return trial, lock(sweep.out / folder(trial) / "lock")


def recover(study: Any, out: Path) -> None:
    """Puts trials back in the queue whose worker and process are gone; their folders stay theirs.

    A process that outlived its worker holds the lock too (it inherited it), so no folder ever has
    two writers; the experiment continues from what it finds there.
    """
    from optuna.trial import TrialState

    for trial in running(study):
        if (abandoned := try_lock(out / folder(trial) / "lock")) is not None:
            with abandoned:
                study.tell(trial.number, state=TrialState.FAIL)
                if "error" not in trial.user_attrs:
                    study.enqueue_trial(trial.params, user_attrs={"folder": folder(trial)})


def folder(trial: Any) -> str:
    return trial.user_attrs.get("folder", f"trial-{trial.number:04d}")


def running(study: Any) -> list[Any]:
    return [t for t in study.get_trials(deepcopy=False) if t.state.name == "RUNNING"]


def finished(study: Any) -> list[Any]:
    """Trials that count: with a value, or with an error of their own (not interrupted)."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    return [t for t in trials if t.state.name == "COMPLETE" or "error" in t.user_attrs]


def completed(study: Any) -> list[Any]:
    """Trials with a value, best first."""
    return sorted((t for t in finished(study) if t.state.name == "COMPLETE"), key=lambda t: t.value)


def run_trial(study: Any, sweep: Sweep, trial: Any, held: IO[bytes]) -> str:
    """Runs the experiment in the trial's folder and tells the study; returns the outcome."""
    from optuna.trial import TrialState

    where = sweep.out / folder(trial)
    command = [sys.executable, str(sweep.experiment.script), *sweep.trial_arguments(trial.params)]
    with held, (where / "log.txt").open("ab") as log:
        code = subprocess.run(
            [*command, "--out", str(where)],
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[held.fileno()],
        ).returncode
        try:
            value = outcome(where, code, sweep.config.objective)
        except UserError as error:
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=TrialState.PRUNED if code == 2 else TrialState.FAIL)
            if isinstance(error, NotMeasuredError):
                raise  # no other trial will measure it either
            return f"{'impossible' if code == 2 else 'failed'}: {error}"
        study.tell(trial, value)
        return f"{value:.5g}"


class NotMeasuredError(UserError):
    """The experiment ran, but does not measure the objective."""


def outcome(where: Path, code: int, objective: str) -> float:
    """The trial's objective. UserError: why it has none."""
    if code != 0:
        lines = (where / "log.txt").read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        raise UserError(said[-1].removeprefix("error: ") if said else f"exit code {code}")
    found = {m["name"]: m["value"] for m in measurements(where)}
    require(bool(found), "the run ended without a measurement in result.json")
    if objective not in found:
        raise NotMeasuredError(
            f"--objective '{objective}' is not measured: use one of {', '.join(found)}"
        )
    value = found[objective]
    require(isinstance(value, int | float) and math.isfinite(value), f"{objective} is {value}")
    return float(value)


def measurements(where: Path) -> list[dict[str, Any]]:
    return read_result(where).get("measurements", [])


def read_result(where: Path) -> dict[str, Any]:
    path = where / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


def work(study: Any, sweep: Sweep) -> None:
    """Runs trials until the sweep has its number, waiting at the end for those of other workers."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True, highlight=False)) as progress:
        task = progress.add_task("", total=sweep.trials)
        while (done := len(finished(study))) < sweep.trials:
            best = "".join(f"best {t.value:.5g} ({folder(t)}), " for t in completed(study)[:1])
            claimed = claim(study, sweep)
            label = f"running {folder(claimed[0])}" if claimed else "waiting for another worker"
            progress.update(task, completed=done, description=best + label)
            if claimed is None:
                time.sleep(0.5)
                continue
            said = run_trial(study, sweep, *claimed)
            params = " ".join(f"{name}={_text(v)}" for name, v in claimed[0].params.items())
            progress.console.print(f"{folder(claimed[0])}  {params}  {said}", markup=False)
            write_table(study, sweep)
        progress.update(task, completed=done, description="done")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_table(study: Any, sweep: Sweep) -> None:
    """DIR/trials.csv: a row for each finished trial."""
    fields = [axis.field for axis in sweep.axes]
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["folder", "state", sweep.config.objective, *fields, "seconds", "error"])
    for t in finished(study):
        seconds = round(t.duration.total_seconds(), 1)
        params = [t.params.get(field) for field in fields]
        rows.writerow(
            [folder(t), t.state.name.lower(), t.value, *params, seconds, t.user_attrs.get("error")]
        )
    write_atomically(sweep.out / "trials.csv", table.getvalue())


def plot(study: Any, sweep: Sweep) -> None:
    """DIR/plots/sweep.png: the objective against each searched field, the best trial marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(sweep.axes), 3.5), layout="constrained")
    panels = figure.subplots(1, len(sweep.axes), sharey=True, squeeze=False)[0]
    trials = completed(study)
    for panel, axis in zip(panels, sweep.axes, strict=True):
        panel.set_xlabel(axis.field)
        if axis.log:
            panel.set_xscale("log")
            panel.tick_params(axis="x", which="both", labelrotation=45)
        values = [t.params[axis.field] for t in trials]
        if axis.choices:
            values = [axis.choices.index(v) for v in values]
            panel.set_xticks(range(len(axis.choices)), axis.choices)
            panel.set_xlim(-0.5, len(axis.choices) - 0.5)
        panel.plot(values, [t.value for t in trials], "o", alpha=0.6)
        panel.plot(values[:1], [trials[0].value], "*", markersize=16, label=folder(trials[0]))
    panels[0].set_ylabel(sweep.config.objective)
    panels[0].legend()
    path = sweep.out / "plots" / "sweep.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def result(study: Any, sweep: Sweep) -> dict[str, Any]:
    """The sweep's result.json, in the form of moe_jax.base.result.

    The environment is the best trial's: the sweep itself measures nothing, and never starts JAX,
    which would take a GPU's memory away from the trials.
    """
    best, *others = completed(study)
    objective, failed = sweep.config.objective, len(finished(study)) - len(others) - 1
    median = statistics.median([best.value, *(t.value for t in others)])
    its = read_result(sweep.out / folder(best))
    unit = next(m.get("unit") for m in its["measurements"] if m["name"] == objective)
    params = ", ".join(f"{name}={_text(value)}" for name, value in best.params.items())
    return {
        "experiment": f"sweep {sweep.name}",
        "question": f"Which {', '.join(a.field for a in sweep.axes)} gives the lowest {objective}?",
        "config": asdict(sweep.config) | {"identity": sweep.identity, "best": best.params},
        "environment": its.get("environment"),
        "measurements": [
            {
                "name": f"best_{objective}",
                "value": best.value,
                "unit": unit,
                "baseline": "median of the trials",
                "ratio": best.value / median if median else None,
                "seeds": [sweep.config.seed],
            },
            {"name": f"median_{objective}", "value": median, "unit": unit},
            {"name": "trials_with_a_value", "value": len(others) + 1, "unit": "trials"},
            {"name": "trials_without_a_value", "value": failed, "unit": "trials"},
        ],
        "verdict": f"{params} gave {best.value:.5g} {unit}, the lowest of {len(others) + 1} trials "
        f"(median {median:.5g}; {failed} more gave none). One seed: repeat before trusting it.",
    }


def best_command(study: Any, sweep: Sweep) -> str:
    """The command line of the best trial, without its folder."""
    presets = sweep.experiment.presets
    config = cli.parse(sweep.trial_arguments(completed(study)[0].params), presets)
    script = f"experiments/{sweep.experiment.script.name}"
    return cli.command_line(config, presets[config.preset], script)


def main(argv: list[str]) -> None:
    sweep = parse(argv)
    require(
        importlib.util.find_spec("optuna") is not None,
        "a sweep needs Optuna, which is not installed: pip install 'moe_jax[sweep]'",
    )
    study = open_study(sweep)
    work(study, sweep)
    write_table(study, sweep)
    if not completed(study):
        error = finished(study)[0].user_attrs["error"]
        raise UserError(f"none of the {sweep.trials} trials gave a value; the first: {error}")
    plot(study, sweep)
    report = result(study, sweep)
    write_atomically(sweep.out / "result.json", json.dumps(report, indent=1) + "\n")
    print(report["verdict"], best_command(study, sweep), f"results: {sweep.out}", sep="\n")


if __name__ == "__main__":
    cli.program(main)
