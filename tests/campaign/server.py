"""Starts programs of the repository from a process that has imported JAX already.

Importing takes longer than a run of twelve steps. So one process imports everything once and forks
for each program. The fork runs the script as `python script arguments` does, in a session of its
own, and ends as an interpreter ends: with its threads joined.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTED = ("matplotlib.pyplot", "moe_jax.runs.run", "moe_jax.runs.decode", "moe_jax.cli")
POLL_SECONDS = 0.002


@dataclass
class Program:
    """A program that was started, and after `wait` how it ended."""

    server: "Server"
    pid: int
    printed: Path
    errors: Path
    started: float = field(default_factory=time.monotonic)
    code: int | None = None
    """Exit code, negative for a signal. None: it has not ended."""
    error_seconds: float = 0.0
    """How long the process lived after the first byte of an `error:` line."""

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.server.ask(poll=self.pid)
        return self.code

    def wait(self, limit: float) -> "Program":
        """Returns when the program has ended. TimeoutError: it has not within `limit` seconds."""
        said: float | None = None
        deadline = time.monotonic() + limit
        while self.poll() is None:
            if said is None and b"error: " in self.errors.read_bytes():
                said = time.monotonic()
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"the program had not ended after {limit:.0f} s")
            time.sleep(POLL_SECONDS)
        self.error_seconds = time.monotonic() - said if said else 0.0
        return self

    def wait_until(self, moment: Callable[[], bool], limit: float) -> bool:
        """Whether the moment came before the program ended."""
        deadline = time.monotonic() + limit
        while not moment():
            if self.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def send(self, number: int) -> None:
        """Sends a signal to the program and to the processes that it started."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # it has not come to its own session yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(POLL_SECONDS)

    def output(self) -> str:
        return self.printed.read_text(errors="replace")

    def error_output(self) -> str:
        return self.errors.read_text(errors="replace")


class Server:
    """The process that forks. Use it as a context."""

    def __init__(self, library: Path | None, environment: Mapping[str, str]) -> None:
        own = {**os.environ, **environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        if library is not None:
            own["LD_PRELOAD"] = str(library)
        own["CAMPAIGN_LIBRARY"] = str(library or "")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            env=own,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        script: str,
        arguments: Sequence[str],
        printed: Path,
        environment: Mapping[str, str] | None = None,
    ) -> Program:
        """Starts a script of the repository. Its output goes to `printed`.out and .err."""
        out = printed.with_name(printed.name + ".out")
        errors = printed.with_name(printed.name + ".err")
        argv = [str(ROOT / script), *arguments]
        files = [str(out), str(errors)]
        errors.touch()
        pid = self.ask(start=argv, files=files, environment=dict(environment or {}))
        return Program(self, pid, out, errors)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.communicate()  # the end of its input is the end of the server


def serve() -> dict[str, Any] | None:
    """Answers requests until the input ends. Returns the request in the fork that shall run it."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    return None


def skip_measurements() -> None:
    """Replaces the measurement of a plain GEMM by a number. It is a quarter of a short run."""
    for name, module in list(sys.modules.items()):
        if name.startswith("moe_jax") and hasattr(module, "gemm_rate"):
            setattr(module, "gemm_rate", lambda *_, **__: 1e11)  # noqa: B010 (a foreign module)


def become(request: dict[str, Any]) -> None:
    """Turns this fork into a process that was just started: session, files, signals, faults."""
    import ctypes

    os.setsid()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, path in enumerate(["/dev/null", *request["files"]]):
        file = os.open(path, flags if number else os.O_RDONLY, 0o644)
        os.dup2(file, number)
        os.close(file)
    # A shell that starts the campaign in the background has it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["environment"])
    if library := os.environ["CAMPAIGN_LIBRARY"]:
        ctypes.CDLL(library).campaign_configure()
    sys.argv = request["start"]
    sys.path[0] = str(Path(sys.argv[0]).parent)


if __name__ == "__main__":
    import importlib
    import warnings

    for module in IMPORTED:
        importlib.import_module(module)
    skip_measurements()
    wanted = serve()
    if wanted is not None:
        # JAX warns of forks, because a backend's threads do not survive them. None is open here.
        warnings.simplefilter("ignore", RuntimeWarning)
        become(wanted)
        runpy.run_path(sys.argv[0], run_name="__main__")
