"""Runs the experiments behind the report, each in a process and a folder of its own."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.base.files import write_atomically

FINISHED = "finished.json"
"""Beside an experiment's result: the command that made it. Written last."""


@dataclass(frozen=True)
class Lever:
    """An experiment at the size of this machine."""

    alias: str
    """The result file of the data file that it makes anew."""
    command: list[str]
    """Without `python` and `--out`."""
    minutes: float
    """What it took on two cores, to say how much time is left."""


@dataclass(frozen=True)
class Outcome:
    """What became of the experiments."""

    results: dict[str, Path]
    """alias -> result.json of those that finished."""
    failed: dict[str, str]
    """alias -> what is known of those that did not."""


def levers_of(rows: Sequence[Mapping[str, Any]], quick: bool) -> list[Lever]:
    """The experiments of a mode. One without an entry for the mode is left out."""
    mode = "quick" if quick else "default"
    return [
        Lever(row["file"], shlex.split(row[mode]["command"]), row[mode]["minutes"])
        for row in rows
        if mode in row
    ]


def run_levers(levers: Sequence[Lever], root: Path, out: Path) -> Outcome:
    """Runs what is not finished yet. A failure is kept and the next experiment goes on."""
    results: dict[str, Path] = {}
    failed: dict[str, str] = {}
    left = sum(lever.minutes for lever in levers if not finished(lever, out))
    for number, lever in enumerate(levers, 1):
        folder = out / "runs" / lever.alias
        state = "done before"
        if not finished(lever, out):
            about = f"about {left:.0f} min left"
            print(f"{number}/{len(levers)} {lever.alias}: {about}", flush=True)
            state = run_one(lever, root, folder)
            left -= lever.minutes
        print(f"{number}/{len(levers)} {lever.alias}: {state}", flush=True)
        if finished(lever, out):
            results[lever.alias] = folder / "result.json"
        else:
            failed[lever.alias] = state
    return Outcome(results, failed)


def finished(lever: Lever, out: Path) -> bool:
    """Whether the result of exactly this command is whole."""
    folder = out / "runs" / lever.alias
    try:
        kept = json.loads((folder / FINISHED).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return kept == lever.command and (folder / "result.json").is_file()


def run_one(lever: Lever, root: Path, folder: Path) -> str:
    """Runs an experiment, with its output in folder/output.txt, and says how it went."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINISHED).unlink(missing_ok=True)
    script, *options = lever.command
    start = time.perf_counter()
    command = [sys.executable, str(root / script), *options, "--out", str(folder)]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=root, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except BaseException:  # a signal: the child must not outlive the report
            process.terminate()
            process.wait()
            raise
    minutes = (time.perf_counter() - start) / 60
    if code == 0 and (folder / "result.json").is_file():
        write_atomically(folder / FINISHED, json.dumps(lever.command))
        return f"finished in {minutes:.1f} min"
    lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
    return f"failed with exit code {code}: {lines[-1] if lines else 'no output'}"
