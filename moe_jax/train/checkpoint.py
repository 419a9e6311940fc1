"""Saves that survive anything: asynchronous, atomic, checksummed, the last N and the best.

Orbax writes a step into a temporary folder and renames it. After that, a manifest with the size and
hash of every file is added. A step without a manifest, or with files that do not match it, is never
loaded. The step before it is used instead.
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
"""Folder inside a checkpoint with the files of Engine.save_beside."""
FORMAT = 2
"""Version of the checkpoints. Version 1 named parameters and derived random keys differently."""

Extra = dict[str, Any]
"""Saved beside the state: config, data position, tokenizer. JSON-serialisable."""


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
        """With `read_only` nothing is removed, because another process may be writing just now."""
        self.read_only = read_only
        self.directory = (directory / "checkpoints").absolute()
        if not read_only:  # Orbax can do this too, but in a thread that may outlive the program
            for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        # Waits for Orbax's own threads and then writes the manifest, while training goes on.
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        policy = keep.AnyPreservationPolicy(
            [
                # And the best of those that were evaluated, beside the newest ones.
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
        """Starts a save and returns once the state is copied. Training goes on meanwhile.

        The folder `beside` becomes a part of the checkpoint (EXPERTS) before the manifest is
        written. It must be complete and on the same disk, because it is renamed. UserError: this
        save or the previous one failed for want of space or permission.
        """
        self.wait()  # one save at a time, so that `_pending` is the only one that can fail
        bits = validation_bits_per_byte
        # NaN would compare as neither better nor worse, and could be kept as the best.
        metrics = {VALIDATION: bits} if bits is not None and math.isfinite(bits) else None
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra | {"format": FORMAT})
        )
        with disk_errors(self.directory):
            started = self._manager.save(step, args=arguments, metrics=metrics)
        assert started, f"Orbax did not save step {step}"
        self._pending = self._worker.submit(self._finish, step, beside)

    def wait(self) -> None:
        """Returns when the last save is complete on disk. UserError: it failed."""
        pending = self._pending
        self._pending = None  # first, so that a failure is raised once and not again by `close`
        if pending is not None:
            with disk_errors(self.directory):
                pending.result()

    def poll(self) -> None:
        """Raises the error of a save that has ended, and does not wait for one under way."""
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
        """The newest checkpoint whose manifest matches, or None. Damaged ones are removed.

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
        restored = self._manager.restore(step, args=arguments)
        return restored["state"], restored["extra"]

    def _verified_steps(self, say: Callable[[str], None]) -> Any:
        """Steps whose files match their manifests, newest first. Damaged ones are removed."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            fault = manifest_fault(self.directory / str(step))
            if fault is None:
                yield step
                continue
            say(f"checkpoint {step} is damaged ({fault}): going back to the one before it")
            if jax.process_index() == 0 and not self.read_only:
                shutil.rmtree(self.directory / str(step), ignore_errors=True)
            self._manager.reload()  # the manager caches the list of steps

    def _finish(self, step: int, beside: Path | None) -> None:
        """Runs in the worker thread. The manifest comes last: it is what makes a step valid."""
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
    """The first fault of a checkpoint's files, in words. None if they are as they were written."""
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
