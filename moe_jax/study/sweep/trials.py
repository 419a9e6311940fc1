"""The trials of a sweep, shared by any number of workers: an Optuna study and a lock per trial.

A trial belongs to whoever holds its lock (locks.py). The worker takes it and its training run
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

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from moe_jax.study.sweep.command import Sweep
from moe_jax.study.sweep.locks import Held
from moe_jax.study.sweep.storage import Shared


class Claim(NamedTuple):
    """A trial that this worker runs."""

    trial: Any
    """optuna.Trial"""
    lock: Held
    """Of the trial and its folder. Leaving it gives both up."""


def claim(shared: Shared, sweep: Sweep) -> Claim | None:
    """The next trial, with its lock. None if every trial is finished or running.

    One worker at a time is in here, so that together they run exactly the number asked for.
    """
    study = shared.study
    with shared.locks.sweep():
        requeue_abandoned(shared)
        started = len(finished(study)) + len(running(study))
        if started >= sweep.trials:
            return None
        # A new sampler, seeded by the trial's place in the sweep, for every trial. A sampler that
        # is created once in a process would repeat its first draws when the command continues.
        # 100003 is a prime, so seeds of the sweep that are close together share no sampler seeds.
        seed = (sweep.config.seed * 100_003 + started) % 2**32
        study.sampler = make_sampler(sweep.config.sampler, seed)
        study.pruner = make_pruner(sweep.config.pruner)
        trial = ask_new(study, sweep)
        trial.set_user_attr("folder", folder(trial))
        return Claim(trial, shared.locks.trial(folder(trial)))


def make_sampler(name: str, seed: int) -> Any:
    """The Optuna sampler. ask_new queues the combinations of a grid itself."""
    from optuna.samplers import RandomSampler, TPESampler

    return TPESampler(seed=seed) if name == "tpe" else RandomSampler(seed=seed)


def make_pruner(name: str) -> Any:
    """The Optuna pruner."""
    from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

    return {"none": NopPruner, "median": MedianPruner, "halving": SuccessiveHalvingPruner}[name]()


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
    for _ in range(REPEATS if sweep.config.sampler != "grid" or waiting(study) else 0):
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


def requeue_abandoned(shared: Shared) -> None:
    """Queues running trials again whose worker and training run are gone. They keep their folder.

    A run that outlived its worker still has the folder's lock, so no folder ever has two writers.
    The experiment continues from the checkpoint that it finds in the folder.
    """
    from optuna.trial import TrialState

    study = shared.study
    for trial in running(study):
        if (abandoned := shared.locks.try_trial(folder(trial))) is not None:
            with abandoned:
                if trial.number not in {now.number for now in running(study)}:
                    continue  # its worker ended it between our first look and our lock
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


def waiting(study: Any) -> list[Any]:
    """Trials that are queued and not begun."""
    return [t for t in study.get_trials(deepcopy=False) if t.state.name == "WAITING"]


def completed(study: Any, sweep: Sweep) -> list[Any]:
    """Trials with values, the best by the first objective first."""
    sign = sweep.objectives[0].sign
    trials = [t for t in finished(study) if t.state.name == "COMPLETE"]
    return sorted(trials, key=lambda trial: sign * trial.values[0])


def front(study: Any, sweep: Sweep) -> list[Any]:
    """The best trial, or the Pareto front of several objectives, in the order of `completed`.

    A trial is on the front if no other one is as good in every objective and better in one.
    """
    trials = completed(study, sweep)
    if len(sweep.objectives) == 1:
        return trials[:1]
    best = {trial.number for trial in study.best_trials}
    return [trial for trial in trials if trial.number in best]
