"""Saves that survive anything: asynchronous, atomic, checksummed, the last N and the best.

Orbax writes a step into a temporary folder and renames it. Once that is done a manifest with the
size and hash of every file is added; a step without a manifest, or whose files do not match it, is
never loaded, and the one before it is used.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from moe_jax.base.errors import require
from moe_jax.base.files import disk_errors, write_atomically
from moe_jax.config import CheckpointConfig
from moe_jax.train.state import TrainState

# Orbax warns at every save without a metric; most saves have none.
logging.getLogger("absl").setLevel(logging.ERROR)

MANIFEST = "MANIFEST.json"
VALIDATION = "validation_bits_per_byte"
EXPERTS = "experts"
"""Folder inside a checkpoint of what was saved beside its state (Engine.save_beside)."""


FORMAT = 2
"""Of checkpoints. Version 1 named parameters and derived random keys differently."""

Extra = dict[str, Any]
"""What is saved beside the state: config, data position, tokenizer. JSON-serialisable."""


class Restored(NamedTuple):
    """A checkpoint that passed its checks."""

    step: int
    folder: Path
    state: TrainState
    extra: Extra


class Checkpoints:
    """The checkpoints of one run, in DIR/checkpoints."""

    def __init__(
        self, directory: Path, config: CheckpointConfig, *, read_only: bool = False
    ) -> None:
        """`read_only` leaves alone what another process may be writing at this moment."""
        self.read_only = read_only
        self.directory = (directory / "checkpoints").absolute()
        if not read_only:  # Orbax can do this too, but in a thread that may outlive the program
            for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        policy = keep.AnyPreservationPolicy(
            [
                keep.LatestN(config.keep),
                keep.BestN(
                    get_metric_fn=lambda metrics: metrics[VALIDATION],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics[VALIDATION],  # without it metrics are not read back
            best_mode="min",
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(
        self,
        step: int,
        state: TrainState,
        extra: Extra,
        validation_bits_per_byte: float | None = None,
        beside: Path | None = None,
    ) -> None:
        """Starts a save and returns once the state is copied; the training goes on meanwhile.

        The folder `beside`, on the same disk and complete, becomes a part of the checkpoint
        (EXPERTS) before its manifest is written.

        Raises UserError if this or the previous save failed for want of space or permission.
        """
        self.wait()
        bits = validation_bits_per_byte
        metrics = {VALIDATION: bits} if bits is not None and math.isfinite(bits) else None
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra | {"format": FORMAT})
        )
        with disk_errors(self.directory):
            started = self._manager.save(step, args=arguments, metrics=metrics)
        assert started, f"Orbax did not save step {step}"
        self._pending = self._worker.submit(self._finish, step, beside)

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises UserError if it failed."""
        pending = self._pending
        # A save that failed is reported once: the next wait does not raise it again.
        self._pending = None
        if pending is not None:
            with disk_errors(self.directory):
                pending.result()

    def poll(self) -> None:
        """Raises what a finished save has to say, without waiting for one that is under way."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            with disk_errors(self.directory):  # Orbax repeats a failed save's error here
                self._manager.close()

    def restore(self, like: TrainState, say: Callable[[str], None]) -> Restored | None:
        """The newest checkpoint whose manifest holds, or None; broken ones are named and removed.

        `like` gives shapes, dtypes and shardings (jax.ShapeDtypeStruct leaves).
        """
        for step in self._verified_steps(say):
            state, extra = self._load(step, like)
            return Restored(step, self.directory / str(step), state, extra)
        return None

    def peek(self, say: Callable[[str], None]) -> Extra | None:
        """`extra` of the checkpoint that `restore` would load, without its arrays.

        UserError: it was written by an older version of moe_jax.
        """
        for step in self._verified_steps(say):
            arguments = ocp.args.Composite(extra=ocp.args.JsonRestore())
            extra = self._manager.restore(step, args=arguments)["extra"]
            require(
                extra.get("format", 1) == FORMAT,
                f"{self.directory} holds checkpoints of format {extra.get('format', 1)}, this "
                f"version of moe_jax reads format {FORMAT}: choose another --out, or load them "
                "with the version that wrote them",
            )
            return extra
        return None

    def _load(self, step: int, like: TrainState) -> tuple[TrainState, Extra]:
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), extra=ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=arguments)
        return found["state"], found["extra"]

    def _verified_steps(self, say: Callable[[str], None]) -> Any:
        """Steps that hold, newest first; removes the ones that do not as it meets them."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            fault = manifest_fault(self.directory / str(step))
            if fault is None:
                yield step
                continue
            say(f"checkpoint {step} is damaged ({fault}): going back to the one before it")
            if jax.process_index() == 0 and not self.read_only:
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
            self._manager.reload()

    def _finish(self, step: int, beside: Path | None) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            if beside is not None:
                beside.rename(self.directory / str(step) / EXPERTS)
            write_manifest(self.directory / str(step))


def _files(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_manifest(directory: Path) -> None:
    """Records size and hash of every file below `directory`, in the file MANIFEST.json."""
    entries = {
        str(path.relative_to(directory)): [path.stat().st_size, _digest(path)]
        for path in _files(directory)
    }
    write_atomically(directory / MANIFEST, json.dumps(entries, indent=0))


def manifest_fault(directory: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None if they are as they were written."""
    try:
        entries = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        return "its write was not finished"
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    if not entries:
        return "it is empty"
    for name, (size, digest) in entries.items():
        if fault := _file_fault(directory, name, size, digest):
            return fault
    return None


def _file_fault(directory: Path, name: str, size: int, digest: str) -> str | None:
    path = directory / name
    if not path.is_file():
        return f"{name} is missing"
    # The size first: it finds a file that was cut off without reading it.
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes instead of {size}"
    try:
        actual = _digest(path)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if actual == digest else f"{name} has changed"
