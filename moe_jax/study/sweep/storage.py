"""Where the trials of a sweep are kept: a journal file in its folder, or a PostgreSQL database."""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.base.errors import UserError, require
from moe_jax.study.sweep.command import Sweep
from moe_jax.study.sweep.journal import load_study, open_journal, stored_identity
from moe_jax.study.sweep.locks import DatabaseLocks, FolderLocks


class Shared(NamedTuple):
    """What the workers of a sweep share."""

    study: Any
    """optuna.Study"""
    storage: Any
    locks: FolderLocks


def open_shared(sweep: Sweep) -> Shared:
    """The sweep's study, begun if need be. UserError: its folder or its database cannot be used."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out '{sweep.out}' cannot be used: {error.strerror}") from None
    if not sweep.config.storage:
        path = sweep.out / "journal.log"
        locks = FolderLocks(sweep.out)
        with locks.sweep():
            storage = open_journal(path)
            study = load_study(storage, sweep, path)
            check_identity(study, sweep, sweep.out)
        return Shared(study, storage, locks)
    engine = connect(sweep.config.database)
    locks = DatabaseLocks(sweep.out, engine, sweep.study)
    with locks.sweep():
        # Inside the lock, because the first worker makes the tables.
        storage = optuna.storages.RDBStorage(sweep.config.database)
        study = load_study(storage, sweep, f"study {sweep.study}")
        check_identity(study, sweep, f"study {sweep.study}")
    return Shared(study, storage, locks)


def connect(address: str) -> Any:
    """Connections to the database that are closed when they are given back, with their locks.

    UserError: the driver is not installed.
    """
    require(
        importlib.util.find_spec("psycopg") is not None,
        "--storage needs psycopg, which is not installed: pip install 'moe_jax[postgresql]'",
    )
    import sqlalchemy
    from sqlalchemy.pool import NullPool

    return sqlalchemy.create_engine(address, poolclass=NullPool, isolation_level="AUTOCOMMIT")


def check_identity(study: Any, sweep: Sweep, where: Path | str) -> None:
    """Marks a new study as this sweep's. UserError: it is a different sweep's."""
    stored = stored_identity(study, sweep.identity)
    if stored is None:
        study.set_user_attr("sweep", sweep.identity)
    elif stored != sweep.identity:
        key = next(k for k in stored if stored[k] != sweep.identity[k])
        another = "--study" if sweep.config.storage else "--out"
        raise UserError(
            f"{where} holds a sweep with {key} {_identity_text(stored[key])}, not "
            f"{_identity_text(sweep.identity[key])}: use another {another}, or the command that "
            "began it"
        )


def _identity_text(value: Any) -> str:
    """A value of Sweep.identity as the command line has it."""
    if isinstance(value, dict):
        return " ".join(f"{name}={v}" for name, v in value.items())
    return f"'{' '.join(value) if isinstance(value, list) else value}'"
