"""A worker of a sweep: claims a trial, runs the experiment as a process, records the outcome."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_jax.base.errors import UserError
from moe_jax.base.signals import REPEATABLE, STOPPING, Stopped, keeping, stop_request
from moe_jax.config import require
from moe_jax.study.sweep.command import Sweep
from moe_jax.study.sweep.report import value_text, write_table
from moe_jax.study.sweep.trials import Claim, claim, completed, finished, folder

REFUSED = 2
"""Exit code of an experiment that refuses its settings (moe_jax.cli.program)."""


class NotMeasuredError(UserError):
    """The experiment ran, but does not measure the objective."""


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
            label = f"running {folder(claimed.trial)}" if claimed else "waiting for another worker"
            progress.update(task, completed=done, description=best + label)
            if claimed is None:
                # The other worker may be killed: then its trial is claimed here.
                time.sleep(0.5)
                continue
            name = folder(claimed.trial)
            with keeping(lambda name=name: f"{sweep.out} is kept, the next start continues {name}"):
                message = run_trial(study, sweep, claimed)
            params = claimed.trial.params.items()
            settings = " ".join(f"{name}={value_text(value)}" for name, value in params)
            line = f"{folder(claimed.trial)}  {settings}  {message}"
            progress.console.print(line, markup=False)
            write_table(study, sweep)
        progress.update(task, completed=done, description="done")


def run_trial(study: Any, sweep: Sweep, claimed: Claim) -> str:
    """Runs the experiment in the trial's folder and tells the study. Returns the outcome as text.

    NotMeasuredError: the experiment does not measure the objective.
    """
    from optuna.trial import TrialState

    trial = claimed.trial
    where = sweep.out / folder(trial)
    command = [sys.executable, *sweep.experiment.program, *sweep.trial_arguments(trial.params)]
    with claimed.folder_lock, (where / "log.txt").open("ab") as log:
        # The run shares the lock: should this worker be killed, the folder stays locked until the
        # run has ended.
        lock = claimed.folder_lock.fileno()
        code = run_process([*command, "--out", str(where)], log, lock)
        try:
            value = read_objective(where, code, sweep.config.objective)
        except UserError as error:
            trial.set_user_attr("error", str(error))
            refused = code == REFUSED
            study.tell(trial, state=TrialState.PRUNED if refused else TrialState.FAIL)
            if isinstance(error, NotMeasuredError):
                raise  # no other trial will measure it either
            return f"{'impossible' if refused else 'failed'}: {error}"
        study.tell(trial, value)
        return f"{value:.5g}"


def run_process(command: list[str], log: IO[bytes], lock: int) -> int:
    """Runs `command` to its end and returns its exit code.

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
            time.sleep(0.05)
    code = process.returncode
    for number in STOPPING:
        if code in (128 + number, -number):
            raise Stopped(number)
    return code


def read_objective(where: Path, code: int, objective: str) -> float:
    """The objective of a trial that ended with this exit code. UserError: why it has none."""
    if code != 0:
        lines = (where / "log.txt").read_text(errors="replace").split("\n")
        written = [line.strip() for line in lines if line.strip()]
        raise UserError(written[-1].removeprefix("error: ") if written else f"exit code {code}")
    path = where / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    values = {m["name"]: m["value"] for m in result.get("measurements", [])}
    require(bool(values), "the run ended without a measurement in result.json")
    if objective not in values:
        raise NotMeasuredError(
            f"--objective '{objective}' is not measured: use one of {', '.join(values)}"
        )
    value = values[objective]
    require(isinstance(value, int | float) and math.isfinite(value), f"{objective} is {value}")
    return float(value)
