"""A training run as a user starts it: teacher, training, report."""

import json
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from moe_jax.base.console import say
from moe_jax.base.errors import UserError, require
from moe_jax.base.files import disk_errors, only_process
from moe_jax.base.paths import user_path
from moe_jax.base.signals import keeping
from moe_jax.config import TrainConfig, fields, from_dict, settings_that_must_match
from moe_jax.parallel.devices import ask_for_devices, require_devices
from moe_jax.parallel.processes import Peers, connected
from moe_jax.runs.load import newest_step
from moe_jax.runs.report import write_report
from moe_jax.runs.teacher import task_of
from moe_jax.train.checkpoint.manifest import manifest_fault
from moe_jax.train.checks import check
from moe_jax.train.engines import engine_of
from moe_jax.train.loop import train


def run_training(config: TrainConfig) -> Path:
    """Runs `config` to its last step and writes the report. Returns the run's folder.

    A run that is finished and has its report is left as it is. UserError: anything that the user
    can mend. It is raised before compiling. Stopped: a signal came, and the step is saved. Several
    processes (config.processes) each call this. If one of them ends early, it ends the others.
    """
    ask_for_devices(config.parallel)
    folder = user_path(config.out)
    with (
        keeping(lambda: what_is_kept(folder, config.last_step)),
        connected(config.processes, settings_of_all(config)) as peers,
    ):
        return run_with(peers, config, folder)


def run_with(peers: Peers, config: TrainConfig, folder: Path) -> Path:
    """run_training in a process that is connected with the others."""
    require_devices(config.parallel)
    require(
        peers.count == 1 or config.distill.on_policy == 0,
        f"distill.on_policy={config.distill.on_policy} and {peers.count} processes: the student "
        "writes its own text in one process only, set distill.on_policy to 0",
    )
    # The task first: a teacher's tokenizer decides the vocabulary that the engine needs.
    task = task_of(config)
    # The first process decides, because others may see its files a little later.
    verdict = finished_verdict(task.config, folder) if peers.index == 0 else None
    verdict = peers.from_first("verdict", verdict)
    if verdict is not None:
        say(describe_finished(task.config, folder, verdict))
        return folder
    engine = engine_of(task.config)
    with peers.first("checks"):
        out = check(engine, task)
    with only_process(out) if peers.index == 0 else nullcontext():
        require_shared(out, peers)
        summary = train(task, engine, out, peers)
        with disk_errors(out):
            write_report(summary)
    return out


def settings_of_all(config: TrainConfig) -> dict[str, Any]:
    """What every process of a run must have been given alike, by name."""
    own = ("processes.", "data.cache")  # caches may lie on each machine's own disk
    return {name: value for name, value in fields(config).items() if not name.startswith(own)}


def require_shared(out: Path, peers: Peers) -> None:
    """UserError: a process does not see the files that the first one writes into the folder."""
    if peers.count == 1:
        return
    token = peers.from_first("token", uuid.uuid4().hex)
    mark = out / f".shared-{token}"
    try:
        with peers.first("mark"), disk_errors(out):
            if peers.index == 0:
                mark.touch()
        seen = peers.exchange("seen", mark.exists())
    finally:
        if peers.index == 0:
            mark.unlink(missing_ok=True)
    require(
        all(seen),
        f"process {seen.index(False) if False in seen else 0} does not see the files of process 0 "
        f"in {out}: --out must lie on a disk that all processes share",
    )


def what_is_kept(out: Path, last: int) -> str:
    """What the next start will find in the folder, for the message of a run that was stopped."""
    step = saved_step(out)
    if step is None:
        return "nothing was saved, because there was no update yet: the same command begins anew"
    if step < last:
        return f"step {step} of {last} is saved: the same command continues from there"
    return f"step {step}, the last one, is saved: the same command writes the report"


def saved_step(out: Path) -> int | None:
    """The step of the newest complete checkpoint. None: there is none."""
    try:
        return newest_step(out)
    except UserError:
        return None


def finished_verdict(config: TrainConfig, out: Path) -> str | None:
    """The verdict of the report in `out`, if it is the report of this very run. Otherwise None."""
    if saved_step(out) != config.last_step:
        return None
    try:
        result = json.loads((out / "result.json").read_text())
        if _settings(from_dict(TrainConfig, result["config"])) != _settings(config):
            return None
        # A damaged checkpoint is no end: the training goes back to the one before it. Last, because
        # the whole checkpoint is read.
        damaged = manifest_fault(out / "checkpoints" / str(config.last_step)) is not None
        return None if damaged else result["verdict"]
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None  # no report, or not one of this version: it is written again


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What the numbers and the files of a report depend on."""
    own = {"samples": config.samples, "teacher": config.distill.teacher}
    return settings_that_must_match(config) | own


def describe_finished(config: TrainConfig, out: Path, verdict: str) -> str:
    """One line: the run's end, its result, and how it is trained longer."""
    constant = config.optim.schedule == "constant" and not config.continue_to
    longer = "--steps N" if constant else "--continue-to N"
    more = f"; {longer} trains it longer" if constant or not config.continue_to else ""
    return f"{out} is finished at step {config.last_step}: {verdict}{more}"
