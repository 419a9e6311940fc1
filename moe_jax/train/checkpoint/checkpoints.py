"""Saves that survive anything: asynchronous, atomic, checksummed, the last N and the best.

A checkpoint is written into a folder of unfinished ones, opened again, given a manifest, and
renamed to its step. A step is loaded only if it matches its manifest. One that does not, or that
this version cannot use, is set aside under another name, and the one before it is used. Nothing is
removed or renamed because a read failed.

Each of several processes writes and reads its own parts of the arrays. The first one does all the
rest: it chooses, names, and removes.
"""

import json
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

from moe_jax.base.errors import UserError, brief
from moe_jax.base.files import ANSWERS, disk_errors, disk_fault, patiently, sync
from moe_jax.base.scratch import make_scratch, remove_scratch
from moe_jax.config import CheckpointConfig
from moe_jax.parallel.processes import ALONE, Peers
from moe_jax.train.checkpoint.arrays import (
    MOST_WORDS,
    make_checkpointer,
    misfit,
    require_arrays,
    require_plain_path,
)
from moe_jax.train.checkpoint.folder import (
    EXPERTS,
    EXTRA,
    FORMAT,
    METRICS,
    STATE,
    VALIDATION,
    Extra,
    Passed,
    begin,
    examine,
    read_errors,
    remove_old,
    set_aside,
    steps_in,
    unfinished_folder,
)
from moe_jax.train.checkpoint.manifest import write_manifest
from moe_jax.train.state import TrainState


class Restored(NamedTuple):
    """A checkpoint that passed its checks."""

    step: int
    folder: Path
    state: TrainState
    extra: Extra


class Checkpoints:
    """The checkpoints of one run, in DIR/checkpoints."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        read_only: bool = False,
        peers: Peers = ALONE,
    ) -> None:
        """With `read_only` nothing is changed, because another process may be writing just now.

        `peers`: the processes that hold the state together. All of them call `save`, `peek` and
        `restore` alike. UserError: no checkpoint could be written to this path.
        """
        self.peers = peers
        self.read_only = read_only
        self.keep = config.keep
        self.directory = (directory / "checkpoints").absolute()
        require_plain_path(self.directory)
        self._checkpointer = make_checkpointer()
        # Waits for Orbax's own threads and then writes the manifest, while training goes on.
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._chosen: tuple[int, Extra] | None = None
        self._passed: list[Passed] = []
        self._examined = False

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
        files = {EXTRA: json.dumps(extra | {"format": FORMAT})}
        if bits is not None and math.isfinite(bits):
            files[METRICS] = json.dumps({VALIDATION: bits})
        folder = unfinished_folder(self.directory.parent) / str(step)
        with disk_errors(self.directory):
            with self.peers.first(f"begin {step}"):
                if self.peers.index == 0:
                    begin(folder)
            self._checkpointer.save(folder / STATE, state)
        count = len(jax.tree.leaves(state))
        self._pending = self._worker.submit(self._finish, folder, count, files, beside)

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
        """Waits for the last save and ends the background threads.

        After an error that ended the other processes nothing is waited for: it would need them.
        """
        if self.peers.leaving:
            self._worker.shutdown(wait=False)
            return
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            with disk_errors(self.directory):
                self._checkpointer.close()

    def peek(self, say: Callable[[str], None]) -> Extra | None:
        """`extra` of the newest checkpoint that is whole, without its arrays. None: there is none.

        Those that are passed over are named. Nothing on the disk is changed. UserError: a
        checkpoint cannot be read, or this version of moe_jax can use none of them.
        """
        if not self._examined:
            self._examined = True
            self._chosen = self._choose(say)
        return None if self._chosen is None else self._chosen[1]

    def restore(self, like: TrainState, say: Callable[[str], None]) -> Restored | None:
        """The checkpoint of `peek` with its state, or None. Those passed over are set aside.

        `like` gives shapes, dtypes and shardings (jax.ShapeDtypeStruct leaves). Called when the run
        really goes on: leftovers of a killed run are removed. UserError: as `peek`.
        """
        self.peek(say)
        restored = None
        while restored is None and self._chosen is not None:
            step, extra = self._chosen
            state = self._load(step, like)
            passed = self._agreed(state)
            if passed is not None:
                self._pass_over(passed, say)
                self._chosen = self._choose(say)
            else:
                assert not isinstance(state, Passed)
                restored = Restored(step, self.directory / str(step), state, extra)
        with self.peers.first("set aside"), disk_errors(self.directory):
            if not self.read_only and self.peers.index == 0:
                self._set_aside()
        return restored

    def _choose(self, say: Callable[[str], None]) -> tuple[int, Extra] | None:
        """As _search, in the first process, which tells the others."""
        found = self._search(say) if self.peers.index == 0 else None
        return self.peers.from_first("checkpoint", found)

    def _agreed(self, state: TrainState | Passed) -> Passed | None:
        """Why a process could not load its part of a checkpoint. None: all could.

        If another one is lost while it reads, this does not return: then nothing is set aside.
        """
        mine = state if isinstance(state, Passed) else None
        found = [each for each in self.peers.exchange("loaded", mine) if each is not None]
        return Passed(*found[0]) if found else None

    def _search(self, say: Callable[[str], None]) -> tuple[int, Extra] | None:
        """The newest usable checkpoint below those that were passed over."""
        known = {passed.step for passed in self._passed}
        with read_errors(self.directory):
            for step in reversed(steps_in(self.directory)):
                if step in known:
                    continue
                folder = self.directory / str(step)
                found = examine(folder)
                if not isinstance(found, Passed):
                    return step, found
                if folder.exists():  # else the run that is being read removed it just now
                    self._pass_over(found, say)
        # Starting over is right if all are damaged, and wrong if another version could go on.
        for passed in self._passed:
            if passed.kind == "unusable":
                raise UserError(f"no checkpoint in {self.directory} can be used: {passed.reason}")
        return None

    def _pass_over(self, passed: Passed, say: Callable[[str], None]) -> None:
        self._passed.append(passed)
        aside = "" if self.read_only else f", it is set aside as {passed.kind}-{passed.step}"
        say(f"checkpoint {passed.step} is {passed.kind} ({passed.reason}){aside}")

    def _load(self, step: int, like: TrainState) -> TrainState | Passed:
        folder = self.directory / str(step) / STATE

        def read() -> TrainState | Passed:
            try:
                if wrong := misfit(self._checkpointer, folder, like):
                    return Passed(step, "unusable", brief(wrong, MOST_WORDS))
                return self._checkpointer.restore(folder, like)
            except Exception as error:
                # tensorstore's errors are no OSError, but have the operating system's words.
                code = disk_fault(error)
                if code is None:
                    raise
                raise OSError(code, os.strerror(code), str(folder)) from error

        try:
            with read_errors(folder):
                return patiently(read)
        except (ValueError, *ANSWERS) as error:
            return Passed(step, "unusable", f"its arrays do not load: {brief(error, MOST_WORDS)}")

    def _set_aside(self) -> None:
        for passed in self._passed:
            set_aside(self.directory, passed.step, passed.kind)
        self._passed = []
        unfinished = unfinished_folder(self.directory.parent)
        remove_scratch(unfinished)
        make_scratch(unfinished)  # refuses, before training, a folder that is somebody else's

    def _finish(
        self, folder: Path, arrays: int, files: dict[str, str], beside: Path | None
    ) -> None:
        """Runs in the worker thread. The last rename is what makes a step appear."""
        self._checkpointer.wait_until_finished()
        if self.peers.index == 0:
            self._complete(folder, arrays, files, beside)
        # So that no process ends before the checkpoint is there.
        self.peers.exchange(f"saved {folder.name}")

    def _complete(
        self, folder: Path, arrays: int, files: dict[str, str], beside: Path | None
    ) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir()
            (folder / name).write_text(content)
        if beside is not None:
            beside.rename(folder / EXPERTS)
        require_arrays(folder / STATE, arrays)
        write_manifest(folder)
        set_aside(self.directory, int(folder.name), "replaced")
        folder.rename(self.directory / folder.name)
        sync(self.directory)
        remove_old(self.directory, self.keep)
