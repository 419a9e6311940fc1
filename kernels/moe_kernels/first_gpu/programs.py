"""Steps that are programs of their own: the ladder, compute-sanitizer, and Nsight Compute."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_kernels.first_gpu.context import Context, Outcome
from moe_kernels.first_gpu.speed import MODEL

SMALL = (sys.executable, "-m", "moe_kernels.first_gpu.small")
SANITIZER = "compute-sanitizer"
PROFILER = "ncu"
PROFILED = {
    "up": "up_kernel",
    "hidden gradient": "hidden_gradient_kernel",
    "gate_up gradient": "matrix_gradient_kernel",
}
"""The three launches with the most FLOPs of their kind, and the names of their kernels."""
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
METRICS = (
    "Duration",
    "Compute (SM) Throughput",
    "DRAM Throughput",
    "L2 Hit Rate",
    "Achieved Occupancy",
    "Registers Per Thread",
)
"""Names in Nsight Compute's report of what is taken into measurements."""
ENDED = 124
"""Exit code of a program whose time was up, as that of timeout(1)."""
MOST_OUTPUT = 200_000
"""Characters of a program's output that are kept, its end."""


def ladder(context: Context) -> Outcome:
    """The ladder of kernels on one model. Its result and its plot go into the folder."""
    settings = context.settings
    if settings.ladder is None:
        return Outcome(False, "no script was given")
    with tempfile.TemporaryDirectory() as folder:
        which = ["--quick"] if settings.dry_run else ["--model", MODEL]
        command = [sys.executable, str(settings.ladder), "--out", folder, *which]
        # Without a GPU the ladder compiles its kernels, which the interpreter does not.
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        code, output = watched(command, context, environment)
        for name in ("result.json", "plots/ladder.png"):
            if (Path(folder) / name).is_file():
                target = settings.folder / f"ladder{Path(name).suffix}"
                shutil.copy(Path(folder) / name, target)
    return Outcome(code == 0, "" if code == 0 else last_line(output))


def memcheck(context: Context) -> Outcome:
    """Accesses outside of arrays, on every kernel once."""
    return sanitized(context, "memcheck")


def racecheck(context: Context) -> Outcome:
    """Races in shared memory, on every kernel once."""
    return sanitized(context, "racecheck")


def sanitized(context: Context, tool: str) -> Outcome:
    """Every kernel once under a tool of compute-sanitizer. The output goes into the folder."""
    options = ["--tool", tool, "--error-exitcode", "1"]
    if tool == "memcheck":
        # XLA asks the driver for much that a device may refuse. Only accesses count.
        options += ["--report-api-errors", "no"]
    prefix = tool_command(context, SANITIZER, options)
    if prefix is None:
        return Outcome(False, f"{SANITIZER} is not installed")
    # Each array is an allocation of its own then, so that an access beside it is seen.
    environment = {**plain_launches(), "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    code, output = watched([*prefix, *SMALL], context, environment)
    (context.settings.folder / f"{tool}.txt").write_text(output)
    errors = sum(int(n) for n in re.findall(r"SUMMARY: (\d+) (?:errors?|hazards?)", output))
    context.report({"name": f"{tool}_errors", "value": errors, "unit": "errors"})
    right = code == 0 and not errors
    return Outcome(right, "" if right else f"{errors} errors; {last_line(output)}")


def profile(context: Context) -> Outcome:
    """Three launches of a model under Nsight Compute. The report goes into the folder."""
    reports: list[str] = []
    failed: list[str] = []
    for launch, kernel in PROFILED.items():
        options = ["--kernel-name", kernel, "--launch-count", "1", "--clock-control", "none"]
        options += [word for section in SECTIONS for word in ("--section", section)]
        prefix = tool_command(context, PROFILER, options)
        if prefix is None:
            return Outcome(False, f"{PROFILER} is not installed")
        if context.left() < 0:
            failed.append(launch)
            continue
        sizes = [] if context.settings.dry_run else ["--shape", MODEL]
        command = [*prefix, *SMALL, *sizes, "--launch", launch]
        code, output = watched(command, context, plain_launches())
        reports.append(output)
        failed += [] if code == 0 else [f"{launch} ({last_line(output)})"]
        for name, unit, value in profiled_metrics(output):
            name = f"{MODEL} {launch} {name}"
            context.report({"name": name, "value": value, "unit": unit})
    (context.settings.folder / "profile.txt").write_text("\n".join(reports)[-MOST_OUTPUT:])
    return Outcome(not failed, f"without {', '.join(failed)}" if failed else "")


def plain_launches() -> dict[str, str]:
    """Variables for a program that is watched: each kernel is launched, none as part of a graph."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
    return {**os.environ, "XLA_FLAGS": flags.strip()}


def profiled_metrics(output: str) -> list[tuple[str, str, float]]:
    """(name, unit, value) of METRICS in a report, whose lines have these three in columns."""
    found = []
    for name in METRICS:
        pattern = rf"^\s*{re.escape(name)}\s+(\S+)\s+([\d.,]+)\s*$"
        if match := re.search(pattern, output, re.MULTILINE):
            found.append((name, match[1], float(match[2].replace(",", ""))))
    return found


def tool_command(context: Context, name: str, options: Sequence[str]) -> list[str] | None:
    """The command that a program is run under, empty in a dry run, None without the tool."""
    if context.settings.dry_run:
        return []
    path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    return [path, *options] if path else None


def watched(
    command: Sequence[str], context: Context, environment: Mapping[str, str]
) -> tuple[int, str]:
    """(exit code, the end of its output), which is printed as well. Ended when the time is up."""
    # The package and its neighbours may be on sys.path without an installation.
    paths = os.pathsep.join(path for path in sys.path if path)
    # A file and not a pipe, which a program of the program would hold open.
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            command,
            env={**environment, "PYTHONPATH": paths},
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,  # so that the tool and the program under it are ended together
        )
        try:
            code = process.wait(max(1.0, context.left()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = ENDED
        file.seek(0)
        output = file.read()[-MOST_OUTPUT:]
    if code == ENDED:
        output += "\nended when its time was up"
    print(output[-MOST_OUTPUT // 10 :], flush=True)
    return code, output


def last_line(output: str) -> str:
    """The last line of an output that is not empty."""
    return next((line for line in reversed(output.splitlines()) if line.strip()), "no output")[:300]
