"""The trials of a sweep, shared by any number of workers: an Optuna study and a lock per folder.

A trial belongs to whoever holds the lock of its folder. The worker takes it and its training run
inherits it, so that the kernel releases it exactly when both are gone, however they ended.

Optuna's own heartbeat and retry (RDBStorage(heartbeat_interval=…) with a retry callback) were tried
with Optuna 5.0 and do not keep a sweep's promises:
- A heartbeat tells that a worker is gone, not that its training run is. The run of a killed worker
  went on as an orphan, and the retry became a second writer in the same folder.
- A command given again within the grace period passed over the killed trial. It ran another one in
  its place and left the killed one marked as running for ever.
- MaxTrialsCallback counts after a trial has ended: two workers asked for 3 trials ran 4.
- The heartbeat needs a database. JournalStorage, one file that workers on a network file system
  can share, has none.
"""

import fcntl
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from moe_jax.base.errors import UserError
from moe_jax.study.sweep.command import Sweep
from moe_jax.study.sweep.journal import load_study, open_journal, stored_identity


class Claim(NamedTuple):
    """A trial that this worker runs."""

    trial: Any
    """optuna.Trial"""
    folder_lock: IO[bytes]
    """The locked file. Closing it gives the folder up."""


def lock(path: Path) -> IO[bytes]:
    """Takes an exclusive lock, which ends with the last process that has the file open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # flock and not lockf: the lock belongs to the open file, which child processes inherit, and
    # not to the process.
    file = path.open("ab")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def try_lock(path: Path) -> IO[bytes] | None:
    """As lock, but None if another process has it."""
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

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out '{sweep.out}' cannot be used: {error.strerror}") from None
    with lock(sweep.out / "sweep.lock"):
        path = sweep.out / "journal.log"
        study = load_study(open_journal(path), path)
        stored = stored_identity(study, sweep.identity)
        if stored is None:
            study.set_user_attr("sweep", sweep.identity)
        elif stored != sweep.identity:
            key = next(k for k in stored if stored[k] != sweep.identity[k])
            raise UserError(
                f"{sweep.out} holds a sweep with {key} {_identity_text(stored[key])}, not "
                f"{_identity_text(sweep.identity[key])}: use another --out, or the command that "
                "began it"
            )
    return study


def _identity_text(value: Any) -> str:
    """A value of Sweep.identity as the command line has it."""
    if isinstance(value, dict):
        return " ".join(f"{name}={v}" for name, v in value.items())
    return f"'{' '.join(value) if isinstance(value, list) else value}'"


def claim(study: Any, sweep: Sweep) -> Claim | None:
    """The next trial, with its folder locked. None if every trial is finished or running.

    One worker at a time is in here, so that together they run exactly the number asked for.
    """
    import optuna

    with lock(sweep.out / "sweep.lock"):
        requeue_abandoned(study, sweep.out)
        started = len(finished(study)) + len(running(study))
        if started >= sweep.trials:
            return None
        # A new sampler, seeded by the trial's place in the sweep, for every trial. A sampler that
        # is created once in a process would repeat its first draws when the command continues.
        # 100003 is a prime, so seeds of the sweep that are close together share no sampler seeds.
        seed = (sweep.config.seed * 100_003 + started) % 2**32
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = ask_new(study, sweep)
        trial.set_user_attr("folder", folder(trial))
        return Claim(trial, lock(sweep.out / folder(trial) / "lock"))


REPEATS = 20
"""Draws that a sampler may spend on settings it had before, until unused ones are searched."""


def ask_new(study: Any, sweep: Sweep) -> Any:
    """A trial with settings that no other one had: a run repeats bit for bit, so twice is wasted.

    A sampler proposes settings again once it takes them for the best. Such a proposal is told as
    failed and drawn again. After REPEATS of them the first unused settings of the grid are queued.
    """
    from optuna.trial import TrialState

    space = {axis.field: axis.distribution() for axis in sweep.axes}
    used = [trial.params for trial in [*finished(study), *running(study)]]
    for _ in range(REPEATS):
        trial = study.ask(space)
        if trial.params not in used:
            return trial
        study.tell(trial, state=TrialState.FAIL)
    if sweep.size is not None:  # claim asks for no more trials than there are combinations
        study.enqueue_trial(next(params for params in grid(sweep) if params not in used))
    return study.ask(space)


def grid(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Every combination of values. Only for axes that have an end of them."""
    values = [axis.choices or range(int(axis.low), int(axis.high) + 1) for axis in sweep.axes]
    fields = [axis.field for axis in sweep.axes]
    yield from (dict(zip(fields, row, strict=True)) for row in itertools.product(*values))


def requeue_abandoned(study: Any, out: Path) -> None:
    """Queues running trials again whose worker and training run are gone. They keep their folder.

    A run that outlived its worker still has the lock, so no folder ever has two writers. The
    experiment continues from the checkpoint that it finds in the folder.
    """
    from optuna.trial import TrialState

    for trial in running(study):
        if (abandoned := try_lock(out / folder(trial) / "lock")) is not None:
            with abandoned:
                study.tell(trial.number, state=TrialState.FAIL)
                # With an error, the worker ended after the run had failed: there is nothing to
                # resume.
                if "error" not in trial.user_attrs:
                    study.enqueue_trial(trial.params, user_attrs={"folder": folder(trial)})


def folder(trial: Any) -> str:
    """Name of the trial's folder. A trial that is queued again has the folder of the first one."""
    return trial.user_attrs.get("folder", f"trial-{trial.number:04d}")


def running(study: Any) -> list[Any]:
    """Trials that a worker began and did not finish, abandoned ones among them."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.name == "RUNNING"]


def finished(study: Any) -> list[Any]:
    """Trials that count: with a value, or with an error of their own (not interrupted)."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    return [t for t in trials if t.state.name == "COMPLETE" or "error" in t.user_attrs]


def completed(study: Any) -> list[Any]:
    """Trials with a value, best first."""
    return sorted((t for t in finished(study) if t.state.name == "COMPLETE"), key=lambda t: t.value)
