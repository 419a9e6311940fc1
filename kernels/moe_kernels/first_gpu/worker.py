"""The process that runs steps. The one that waits for it never touches the device."""

import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from moe_kernels.errors import first_line
from moe_kernels.first_gpu.context import Context, Outcome, Settings

MARGIN = 10.0
"""Seconds between the time at which a step should end by itself and the end of its process, or a
tenth of the step's time where that is less."""


def serve(connection: Connection, parent: int, settings: Settings) -> None:
    """Runs the steps that are asked for, one after the other, until None is received.

    Sends ("measurement", m) as they come, then ("outcome", o).
    """
    os.setsid()  # a session of its own, so that the parent can end it with all that it starts
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    prepare(settings)
    # After prepare: JAX and Triton read these variables when they are imported.
    from moe_kernels.first_gpu.steps import STEPS

    while request := connection.recv():
        name, seconds = request
        until = time.monotonic() + seconds - min(MARGIN, seconds / 10)
        context = Context(settings, until, lambda m: connection.send(("measurement", m)))
        try:
            outcome = STEPS[name](context)
        except Exception as error:  # noqa: BLE001 - the next step must run whatever this one did
            traceback.print_exc()
            outcome = Outcome(False, first_line(error), broken=True)
        connection.send(("outcome", outcome))


def prepare(settings: Settings) -> None:
    """Sets the variables that JAX and Triton read."""
    # JAX would take three quarters of the card at once, and leave torch and the ladder without.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if settings.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["TRITON_INTERPRET"] = "1"


def end_with(parent: int) -> None:
    """Ends this session when the parent has gone, which can be killed itself."""
    while os.getppid() == parent:
        time.sleep(1)
    end_session(os.getpid())


def end_session(leader: int) -> None:
    """Ends the process `leader` and all of its session, the programs that it started included.

    A program may have started others, or have a process group of its own. The session is what they
    share. The leader is the last, because it may be this process.
    """
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold anything: state, parent, process group, session.
            session = int(path.read_text().rpartition(")")[2].split()[3])
            if session == leader and int(path.parent.name) != leader:
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue  # it has gone by now, or is another user's
    os.kill(leader, signal.SIGKILL)
