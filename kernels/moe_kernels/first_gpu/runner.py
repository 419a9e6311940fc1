"""Steps under deadlines, in a process that can be ended whatever it does.

A hang in a compiler or in a kernel holds its thread outside of Python, where no exception reaches
it. So steps run in a worker process, and this one waits, writes, and ends the worker when a step's
time is up. Starting a worker takes seconds (imports, the device's context), so one worker runs step
after step. After a step that was ended or raised it is replaced: a CUDA error stays with its
process, and every later call there would fail.
"""

import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

from moe_kernels.first_gpu.context import Measurement, Outcome, Settings
from moe_kernels.first_gpu.worker import end_session, serve

PATIENCE = 5.0
"""Seconds for a killed process to go away. One that waits for the device may stay."""


class Worker:
    """A process that runs steps, with a connection to it."""

    def __init__(self, settings: Settings, target: Callable[..., None] = serve) -> None:
        # spawn and not fork: CUDA does not survive a fork.
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, os.getpid(), settings))
        self.process.start()
        theirs.close()  # so that the worker's end is the only one, and its death is seen

    def kill(self) -> None:
        """Ends the process and all that it started."""
        pid = self.process.pid
        assert pid is not None  # it was started
        if self.process.is_alive():
            end_session(pid)
        self.process.join(PATIENCE)
        self.connection.close()


class Runner:
    """Runs steps in a worker, which is replaced when it has to be."""

    def __init__(self, settings: Settings, target: Callable[..., None] = serve) -> None:
        self.settings = settings
        self.target = target
        self.worker: Worker | None = None

    def perform(self, name: str, seconds: float, report: Callable[[Measurement], None]) -> Outcome:
        """Runs a step for at most `seconds`. What it measured until then is reported."""
        deadline = time.monotonic() + seconds
        self.worker = self.worker or Worker(self.settings, self.target)
        try:
            self.worker.connection.send((name, seconds))
            while self.worker.connection.poll(max(0.0, deadline - time.monotonic())):
                kind, content = self.worker.connection.recv()
                if kind == "outcome":
                    if content.broken:
                        self.close()
                    return content
                report(content)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return Outcome(False, f"its process ended with {self._exit()}", broken=True)
        self.close()
        return Outcome(False, f"ended at its deadline of {seconds:.0f} s", broken=True)

    def _exit(self) -> str:
        """How the worker ended, in words. It is closed then."""
        worker: Any = self.worker
        worker.process.join(PATIENCE)
        code = worker.process.exitcode
        self.close()
        return f"signal {-code}" if code and code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Ends the worker. The next step starts another one."""
        if self.worker:
            self.worker.kill()
        self.worker = None
