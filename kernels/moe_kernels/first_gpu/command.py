"""The command line of kernels/first_gpu.py, and the order of the steps."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moe_kernels.first_gpu.context import Settings
from moe_kernels.first_gpu.record import Predictions, Record
from moe_kernels.first_gpu.runner import Runner

REST = float("inf")
PARTS: dict[str, dict[str, float]] = {
    "measure": {
        "environment": 60,
        "correctness": 100,
        "launches": 60,
        "layers": 130,
        "memory": 30,
        "ladder": 110,
        "tiles": 60,
        "soak": REST,
    },
    "tools": {"environment": 60, "memcheck": 150, "racecheck": 150, "profile": REST},
    "large": {
        "environment": 60,
        "large launches": 150,
        "large layers": 200,
        "decoding": REST,
    },
}
"""By part of the whole: steps in their order, with the seconds that each may take in a run of
MINUTES. A longer or shorter run scales them. What a step leaves is the last one's."""
MINUTES = 9.0
FIRST = "environment"
"""Without it no other step can run. Its seconds are not scaled: imports do not get faster."""
LEAST = 3.0
"""Seconds that a step needs to be worth its start."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Tests and measures the kernels on a GPU, in steps with deadlines."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="all steps together")
    parser.add_argument(
        "--part",
        choices=list(PARTS),
        default="measure",
        help="measure: tests and times. tools: compute-sanitizer and Nsight Compute. "
        "large: DeepSeek-V3's sizes and decoding",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, without a GPU"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str], settings: Settings, predicted: Path) -> int:
    """Runs the steps. Returns 0 if all are ok, 1 if one is not, 2 for a mistake in the command.

    `settings` has the peers and the ladder. Its folder and dry_run are the command line's.
    """
    options = parse(argv)
    if not options.minutes > 0:
        print(f"--minutes {options.minutes} must be above 0", file=sys.stderr)
        return 2
    settings = settings._replace(folder=options.out.absolute(), dry_run=options.dry_run)
    suffix = "" if options.part == "measure" else f"_{options.part}"
    head = {"command": list(argv), "part": options.part, "dry_run": options.dry_run}
    record = Record(
        settings.folder / f"first_gpu{suffix}.json",
        # The times of a dry run are the interpreter's: nothing was predicted for them.
        {**head, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
        Predictions(settings.folder / "none" if options.dry_run else predicted),
    )
    try:
        record.write()
    except OSError as error:
        print(f"--out {options.out}: {error}", file=sys.stderr)
        return 2
    run(PARTS[options.part], options.minutes, Runner(settings), record)
    print(record.table())
    return 0 if all(step["ok"] for step in record.steps) else 1


def run(steps: dict[str, float], minutes: float, runner: Runner, record: Record) -> None:
    """All steps in their order until the time is up. Without the first one none is run."""
    end = time.monotonic() + 60 * minutes
    scale = minutes / MINUTES
    try:
        for name, seconds in steps.items():
            wanted = seconds if name == FIRST else scale * seconds
            allowed = min(wanted, end - time.monotonic())
            if allowed < LEAST:
                record.skip(name, "no time was left")
                continue
            print(f"\n== {name}, at most {allowed:.0f} s", flush=True)
            start = time.monotonic()
            outcome = runner.perform(name, allowed, record.add_measurement)
            record.add_step(name, outcome, time.monotonic() - start, allowed)
            print(f"== {name}: {'ok' if outcome.ok else 'FAILED'} {outcome.reason}", flush=True)
            if name == FIRST and not outcome.ok:
                return
    finally:
        runner.close()
