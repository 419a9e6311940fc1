"""Reading a sweep's journal, whose lines may be damaged or another program's.

Optuna believes every line. So each one is looked at before Optuna replays them, and what the replay
gives is looked at before a worker uses it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from moe_jax.base.errors import UserError, quote, reading, require
from moe_jax.base.paths import read_file
from moe_jax.study.sweep.command import Sweep
from moe_jax.study.sweep.locks import database_errors

MOST_BYTES = 256 << 20
"""A sweep of ten thousand trials writes about 20 MB."""
REMEDY = "remove the line, or begin another sweep with --out"
FOLDER = re.compile(r"trial-\d{4,9}")


def open_journal(path: Path) -> Any:
    """The Optuna storage of a journal, created if need be. UserError: a line cannot be read."""
    from optuna.storages import JournalStorage, journal

    with reading(path, REMEDY):
        lock = journal.JournalFileSymlinkLock(str(path))
        lock.acquire()  # another worker may be in the middle of a line
        try:
            if path.exists():
                _check_lines(path)
        finally:
            lock.release()
        return JournalStorage(journal.JournalFileBackend(str(path)))


def load_study(storage: Any, sweep: Sweep, source: Path | str) -> Any:
    """The sweep's Optuna study, begun if need be. UserError: its trials are no such sweep's."""
    import optuna

    wanted: list[Any] = [objective.direction for objective in sweep.objectives]
    with database_errors(sweep.config.storage), reading(source, REMEDY):
        study = optuna.create_study(
            storage=storage, study_name=sweep.study, load_if_exists=True, directions=wanted
        )
        found = [direction.name.lower() for direction in study.directions]
        require(
            found == wanted,
            f"its study is to {' and '.join(found) or 'do nothing'}, not to "
            f"{' and '.join(wanted)}: begin another one with --out",
        )
        for trial in study.get_trials(deepcopy=False):
            _check_trial(trial, len(wanted))
        return study


def stored_identity(study: Any, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Sweep.identity as the journal has it, None in a new one. UserError: it has another shape."""
    stored = study.user_attrs.get("sweep")
    known = stored is None or (isinstance(stored, dict) and stored.keys() == wanted.keys())
    require(known, f"the journal's sweep is {quote(stored)}: begin another one with --out")
    return stored


def _check_lines(path: Path) -> None:
    data = read_file(path, MOST_BYTES)
    *lines, cut = data.split(b"\n")
    if cut:
        # A killed worker leaves this. Optuna would append to it, and could then read neither line.
        os.truncate(path, len(data) - len(cut))
    for number, line in enumerate(lines, 1):
        try:
            log = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} is no JSON: {REMEDY}") from error
        known = isinstance(log, dict) and type(log.get("op_code")) is int
        require(known, f"line {number} is no record of a sweep: {REMEDY}")


def _check_trial(trial: Any, objectives: int) -> None:
    name = trial.user_attrs.get("folder", "trial-0000")
    # A folder elsewhere would be written to.
    named = isinstance(name, str) and FOLDER.fullmatch(name)
    require(bool(named), f"trial {trial.number} has the folder {quote(name)}: {REMEDY}")
    values = [0.0] * objectives if trial.state.name != "COMPLETE" else trial.values
    # type() in place of isinstance(), because True is an int.
    numbers = isinstance(values, list) and [type(v) in (int, float) for v in values]
    require(
        numbers == [True] * objectives,
        f"trial {trial.number} has the value {quote(values)}: {REMEDY}",
    )
    error = trial.user_attrs.get("error", "")
    require(isinstance(error, str), f"trial {trial.number} has the error {quote(error)}: {REMEDY}")
