"""Random cases through the kernels for as long as you like, against float64 in NumPy.

    python -m moe_kernels.soak --minutes 10 [--json FILE] [--seed N] [--interpret]
    python -m moe_kernels.soak --case "tokens=3 width=8 ... seed=5"

A case draws sizes, skew, dtype and whether some assignments have no expert. Gate, schedule and
experts run twice on fresh inputs, forward and backward. Both runs must agree bit for bit. They must
agree with the oracle within tolerances, output and every gradient by name. Nothing may be left
unwritten: outputs start as NaN in the interpreter, and on a GPU the free memory is filled with NaN.

A failure is shrunk to a smaller case that still fails, and printed as a command. Without a GPU the
kernels run in Triton's interpreter. It exits with 1 after failures.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from moe_kernels.files import write_json
from moe_kernels.launch import missing_package
from moe_kernels.soak.case import parse_case
from moe_kernels.soak.check import attempt
from moe_kernels.soak.search import soak

LARGEST_INTERPRETED = 160
LARGEST_COMPILED = 3000
"""Largest sizes of a case. The interpreter runs programs one after the other in NumPy."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Random cases through the kernels.")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for cases and failures")
    parser.add_argument("--case", help="run this case alone")
    parser.add_argument("--interpret", action="store_true", help="in NumPy, also on a GPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Runs one case, or cases until the time is up."""
    options = parse(argv)
    if problem := missing_package():
        print(f"moe_kernels.soak runs kernels: {problem}", file=sys.stderr)
        return 2
    # Set before the first kernel is imported: Triton reads it once.
    if options.interpret or jax.default_backend() != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = "Triton's interpreter" if interpreted else jax.devices()[0].device_kind
    if options.case:
        return run_case(options.case, device)
    if options.minutes <= 0:
        print(f"--minutes {options.minutes} must be above 0", file=sys.stderr)
        return 2
    if options.seed < 0:
        print(f"--seed {options.seed} must not be negative", file=sys.stderr)
        return 2
    print(f"{options.minutes} minutes in {device}, seed {options.seed}", flush=True)
    largest = LARGEST_INTERPRETED if interpreted else LARGEST_COMPILED
    cases, failures = soak(options.minutes, options.seed, largest)
    print(f"{cases} cases, {len(failures)} failures")
    if options.json:
        content = {"cases": cases, "failures": len(failures), "details": failures, "device": device}
        write_json(options.json, content)
    return 1 if failures or not cases else 0


def run_case(text: str, device: str) -> int:
    """Runs the case of a text. Returns 1 for a fault, 2 for a text that is no case."""
    try:
        case = parse_case(text)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    fault = attempt(case)
    print(f"{device}: {fault or 'no fault'}")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
