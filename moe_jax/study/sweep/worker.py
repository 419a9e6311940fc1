"""A worker of a sweep: claims a trial, runs the experiment as a process, records the outcome."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_jax.base.console import Throttle, open_console
from moe_jax.base.errors import UserError
from moe_jax.base.signals import REPEATABLE, STOPPING, Stopped, keeping, stop_request
from moe_jax.config import require
from moe_jax.study.sweep.command import Sweep
from moe_jax.study.sweep.report import value_text, values_text, write_table
from moe_jax.study.sweep.storage import Shared
from moe_jax.study.sweep.trials import Claim, claim, completed, finished, folder
from moe_jax.train.metrics import read_lines

REFUSED = 2
"""Exit code of an experiment that refuses its settings (moe_jax.cli.program)."""
REPORT_SECONDS = 1.0
"""Time between two looks at the metrics of a running trial."""


class NotMeasuredError(UserError):
    """The experiment ran, but does not measure the objective."""


def work(shared: Shared, sweep: Sweep) -> None:
    """Runs trials until the sweep has its number, waiting at the end for those of other workers."""
    study = shared.study
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    shown = open_console(stderr=True)
    with Progress(*columns, console=shown, disable=not shown.is_terminal) as progress:
        task = progress.add_task("", total=sweep.trials)
        while (done := len(finished(study))) < sweep.trials:
            best = "".join(
                f"best {values_text(t.values)} ({folder(t)}), " for t in completed(study, sweep)[:1]
            )
            claimed = claim(shared, sweep)
            label = f"running {folder(claimed.trial)}" if claimed else "waiting for another worker"
            progress.update(task, completed=done, description=best + label)
            if claimed is None:
                # The other worker may be killed: then its trial is claimed here.
                time.sleep(0.5)
                continue
            name = folder(claimed.trial)
            if not shown.is_terminal:
                shown.print(f"{done} of {sweep.trials} trials are done. {best}{label}")
            with keeping(lambda name=name: f"{sweep.out} is kept, the next start continues {name}"):
                message = run_trial(study, sweep, claimed)
            params = claimed.trial.params.items()
            settings = " ".join(f"{name}={value_text(value)}" for name, value in params)
            line = f"{folder(claimed.trial)}  {settings}  {message}"
            shown.print(line, markup=False)
            write_table(study, sweep)
        progress.update(task, completed=done, description="done")


def run_trial(study: Any, sweep: Sweep, claimed: Claim) -> str:
    """Runs the experiment in the trial's folder and tells the study. Returns the outcome as text.

    NotMeasuredError: the experiment does not measure or report the objective.
    """
    from optuna.trial import TrialState

    trial = claimed.trial
    where = sweep.out / folder(trial)
    command = [sys.executable, *sweep.experiment.program, *sweep.trial_arguments(trial.params)]
    reports = None
    if sweep.config.pruner != "none":
        reports = Reports(trial, where / "metrics.jsonl", sweep.objectives[0].name)
    with claimed.lock, (where / "log.txt").open("ab") as log:
        # The run shares the lock: should this worker be killed, the folder stays locked until the
        # run has ended.
        lock = claimed.lock.fileno()
        code = run_process([*command, "--out", str(where)], log, lock, reports)
        if code is None:
            assert reports is not None
            trial.set_user_attr("error", reports.why)
            study.tell(trial, state=TrialState.PRUNED)
            return reports.why
        try:
            values = read_objectives(where, code, sweep, trial)
            if reports is not None:
                reports.require_any(sweep.config.pruner)
        except UserError as error:
            trial.set_user_attr("error", str(error))
            refused = code == REFUSED
            study.tell(trial, state=TrialState.PRUNED if refused else TrialState.FAIL)
            if isinstance(error, NotMeasuredError):
                raise  # no other trial will measure it either
            return f"{'impossible' if refused else 'failed'}: {error}"
        study.tell(trial, values)
        return values_text(values)


class Reports:
    """The objective of a trial that runs, as it appears in metrics.jsonl, for Optuna's pruner."""

    def __init__(self, trial: Any, path: Path, objective: str) -> None:
        self.why = ""
        """Why the trial was ended early."""
        self._trial = trial
        self._path = path
        self._objective = objective
        self._steps: set[int] = set()
        self._throttle = Throttle(REPORT_SECONDS)

    def prune(self) -> bool:
        """Passes on what is new. Whether the trial is to be ended early."""
        if self.why or not self._throttle.ready():
            return False
        for line in read_lines(self._path):
            value = line.get(self._objective)
            if isinstance(value, int | float) and line["step"] not in self._steps:
                self._steps.add(line["step"])
                self._trial.report(float(value), line["step"])
                if self._trial.should_prune():
                    self.why = f"ended early at step {line['step']} with {value:.5g}"
                    return True
        return False

    def require_any(self, pruner: str) -> None:
        """NotMeasuredError: the trial has ended and its metrics.jsonl lacks the objective."""
        if not any(self._objective in line for line in read_lines(self._path)):
            raise NotMeasuredError(
                f"--pruner {pruner} needs the objective while a trial runs, and metrics.jsonl has "
                f"no '{self._objective}': unset it, or choose another objective"
            )


def run_process(
    command: list[str], log: IO[bytes], lock: int, reports: Reports | None = None
) -> int | None:
    """Runs `command` to its end and returns its exit code. None: `reports` ended it early.

    A signal to this worker is passed on, and the run's end is waited for: it saves first. Stopped:
    the worker or its run was stopped. The trial stays open and continues with the next start.
    """
    with stop_request() as stop:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock])
        passed_on = False
        while process.poll() is None:
            if stop.number is not None and not passed_on:
                process.send_signal(REPEATABLE)  # Ctrl-C has reached the run already
                passed_on = True
            elif reports is not None and reports.prune():
                process.send_signal(REPEATABLE)
            time.sleep(0.05)
    code = process.returncode
    ended = [number for number in STOPPING if code in (128 + number, -number)]
    # A run that had reached its end before the signal came has its objective.
    if ended and reports is not None and reports.why and stop.number is None:
        return None
    if ended:
        raise Stopped(ended[0])
    return code


def read_objectives(where: Path, code: int, sweep: Sweep, trial: Any) -> list[float]:
    """The objectives of a trial that ended with this exit code. UserError: why it has none.

    The trial keeps their units and the environment, which other machines cannot read from here.
    """
    if code != 0:
        lines = (where / "log.txt").read_text(errors="replace").split("\n")
        written = [line.strip() for line in lines if line.strip()]
        raise UserError(written[-1].removeprefix("error: ") if written else f"exit code {code}")
    path = where / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    measured = {m["name"]: m for m in result.get("measurements", [])}
    require(bool(measured), "the run ended without a measurement in result.json")
    values = []
    for objective in sweep.objectives:
        name = objective.name
        if name not in measured:
            raise NotMeasuredError(
                f"--objective '{name}' is not measured: use one of {', '.join(measured)}"
            )
        value = measured[name]["value"]
        require(isinstance(value, int | float) and math.isfinite(value), f"{name} is {value}")
        values.append(float(value))
    units = [measured[objective.name].get("unit", "") for objective in sweep.objectives]
    trial.set_user_attr("units", units)
    trial.set_user_attr("environment", result.get("environment"))
    return values
