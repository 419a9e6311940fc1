"""What every kernel compiles to, on GPUs that need not be there.

    python -m moe_kernels.audit [--arch 80 86 89 90 100 120] [--all] [--json FILE]

The kernels' own API is traced at real sizes, and every launch is compiled for each architecture.
Registers and spills are ptxas's. The rest is counted in the SASS and the PTX. It exits with 1 and
names the rows where a rule is broken: spills, local memory, all 255 registers, too much shared
memory, no product on the matrix units (for FP8 kernels on their FP8 inputs), or no asynchronous
copy.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from moe_kernels.audit.cases import all_cases, audit_case
from moe_kernels.audit.compile import LIMITS
from moe_kernels.audit.rules import broken_rules
from moe_kernels.experts.shapes import BLOCK_ROWS
from moe_kernels.files import write_json
from moe_kernels.launch import fp8_support, lowering_for, missing_package

ARCHITECTURES = tuple(LIMITS)
COLUMNS = {
    "kernel": 17,
    "config": 68,
    "arch": 4,
    "registers": 9,
    "spill_bytes": 11,
    "shared_bytes": 12,
    "cp_async": 8,
    "tma": 3,
    "mbarrier": 8,
    "setmaxnreg": 10,
    "mma": 4,
    "fp8_mma": 7,
    "wide_accesses": 13,
    "hints": 5,
    "local_accesses": 14,
    "special": 7,
    "occupancy": 9,
}
"""Width of each column of the table in characters."""


def show(row: dict[str, Any]) -> str:
    """A line of the table."""
    values = {k: f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in row.items()}
    return "  ".join(values[key].ljust(width) for key, width in COLUMNS.items())


def main(argv: Sequence[str]) -> int:
    """Compiles, prints and writes. Returns 1 if a rule is broken, 2 without Triton."""
    parser = argparse.ArgumentParser(description="What every kernel compiles to.")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--all", action="store_true", help="float16 and every block size as well")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(argv)
    if problem := missing_package():
        print(f"moe_kernels.audit compiles with Triton: {problem}", file=sys.stderr)
        return 2
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled
    dtypes = ("bfloat16", "float32", "float16") if options.all else ("bfloat16", "float32")
    blocks = BLOCK_ROWS if options.all else (BLOCK_ROWS[0], BLOCK_ROWS[-1])
    print("  ".join(key.ljust(width) for key, width in COLUMNS.items()))
    for arch in options.arch:
        with lowering_for(arch):
            support = fp8_support()
        if support.name == "none":
            print(f"no FP8 rows for {arch}: {support.reason}")
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    # spawn and not fork: JAX has threads of its own by now.
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        for case_rows in pool.map(audit_case, all_cases(options.arch, dtypes, blocks)):
            for row in case_rows:
                rows.append(row)
                print(show(row), flush=True)
                broken += [f"{show(row)}: {rule}" for rule in broken_rules(row)]
    if options.json:
        write_json(options.json, rows)
    for line in broken:
        print(f"BROKEN {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
