"""The metrics of a run in other tools: TensorBoard's event files, Weights & Biases.

metrics.jsonl stays the record of a run. These are copies of it for the eye.
"""

import hashlib
import importlib.util
import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from moe_jax.base.console import say
from moe_jax.base.errors import require
from moe_jax.config import TrainConfig, fields

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""The optional package of each kind of log."""


class Log(Protocol):
    """Takes the lines of metrics.jsonl."""

    def write(self, line: dict[str, Any]) -> None:
        """Copies one line."""
        ...

    def close(self) -> None:
        """Writes what is still in memory."""
        ...


class NoLog:
    """In place of a log, where none is wanted."""

    def write(self, line: dict[str, Any]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def check_log(config: TrainConfig) -> None:
    """UserError: the package that config.log needs is not installed."""
    if config.log == "none":
        return
    package = PACKAGES[config.log]
    require(
        importlib.util.find_spec(package) is not None,
        f"--log {config.log} needs {package}, which is not installed: pip install {package}",
    )


def open_log(config: TrainConfig, out: Path, resume_after: int) -> Log:
    """The log that config.log names. Updates after `resume_after` are done again."""
    if config.log == "tensorboard":
        return TensorBoardLog(out, resume_after)
    return WandbLog(config, out) if config.log == "wandb" else NoLog()


def scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) for what a line has. A list over layers gives a number a layer.

    The load of each expert is left out: it is a table, and in metrics.jsonl.
    """
    for name, value in line.items():
        if type(value) in (int, float):
            yield name, float(value)
        elif isinstance(value, list) and all(type(item) in (int, float) for item in value):
            yield from ((f"{name}/layer_{index}", float(item)) for index, item in enumerate(value))


class TensorBoardLog:
    """Event files in OUT/tensorboard: `tensorboard --logdir OUT`."""

    def __init__(self, out: Path, resume_after: int) -> None:
        from tensorboardX import SummaryWriter

        # purge_step hides what a killed process logged beyond its checkpoint.
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=resume_after + 1)

    def write(self, line: dict[str, Any]) -> None:
        for name, value in scalars(line):
            if name != "step":
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


def _has_wandb_key() -> bool:
    """Whether `wandb login` or the environment has left a key for Weights & Biases."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        return netrc.netrc().authenticators(host.partition("://")[2].rstrip("/")) is not None
    except (OSError, netrc.NetrcParseError):
        return False  # no such file, or none that can be read


class WandbLog:
    """A run of Weights & Biases, offline where nobody is logged in: `wandb sync OUT/wandb/…`."""

    def __init__(self, config: TrainConfig, out: Path) -> None:
        import wandb

        offline = "WANDB_MODE" not in os.environ and not _has_wandb_key()
        if offline:
            say("nobody is logged in at Weights & Biases: the run is logged offline")
        # Offline runs are not resumed, but uploaded under the same id they become one.
        name = str(out.resolve())
        self._run = wandb.init(
            project="moe_jax",
            name=out.resolve().name,
            id=hashlib.sha256(name.encode()).hexdigest()[:16],
            resume="allow",
            dir=str(out),
            config=fields(config),
            mode="offline" if offline else None,
            settings=wandb.Settings(silent=True),
        )

    def write(self, line: dict[str, Any]) -> None:
        values = {name: value for name, value in scalars(line) if name != "step"}
        self._run.log(values, step=line["step"])

    def close(self) -> None:
        self._run.finish()
