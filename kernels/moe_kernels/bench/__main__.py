"""The kernels beside their peers and the device's own GEMM, on real sizes. Needs a GPU.

    python -m moe_kernels.bench [--json FILE] [--plot FILE] [--shapes NAME ...]
        [--launches | --decode | --tune]
        [--layer xla=moe_jax.moe.xla:mixture --plan moe_jax.moe.plan:make_plan]

It measures one grouped GEMM, the whole layer forward, and forward with backward, for every shape.
Peers are lax.ragged_dot, tokamax's ragged_dot and torch's grouped_mm where they are installed, and
every --layer. It prints TFLOP/s of useful work, the fraction of a large GEMM's rate in the same
rounds, and the bytes that the compiled program allocates.

--launches: every launch of a training step by itself. --decode: few tokens, in microseconds.
--tune: candidates for every entry of the kernels' table, to be written into
moe_kernels/experts/shapes.py. Only the launches of that entry are compiled and timed.

What does not fit into memory or does not compile is left out with a line.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_kernels.bench.measure import measure_decoding, measure_launches, measure_layers
from moe_kernels.bench.peers import load_peers
from moe_kernels.bench.plot import draw
from moe_kernels.bench.shapes import SHAPES
from moe_kernels.bench.tune import tune
from moe_kernels.errors import first_line
from moe_kernels.files import write_json
from moe_kernels.launch import triton_support
from moe_kernels.timing import device_report

TUNING_ROUNDS = 3
"""Candidates are many, and a small difference between two does not matter."""


def show(row: dict[str, Any]) -> None:
    """Prints a row."""
    print(f"\n{row['name']} {row['dtype']}")
    for call, values in (row.get("calls") or row.get("decoding") or {}).items():
        cells = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)
        print(f"  {call:24} {cells}", flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The kernels beside their peers, on a GPU.")
    parser.add_argument("--json", type=Path, default=Path("kernels/results/bench.json"))
    parser.add_argument("--plot", type=Path, help="PNG of the fractions")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=7)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--launches", action="store_true", help="launches instead of layers")
    instead.add_argument("--decode", action="store_true", help="few tokens instead of many")
    instead.add_argument("--tune", action="store_true", help="tiles instead of peers")
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION",
        help="one more layer to compare with: (x, weights, gate_up, down, plan) -> out",
    )
    parser.add_argument(
        "--plan",
        metavar="MODULE:FUNCTION",
        help="the plan of all layers: (experts, number of experts) -> plan; "
        "by default the schedule kernels'",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Measures and prints. The file is written after every row."""
    options = parse(argv)
    # JAX would take three quarters of the card at once, and leave torch's peer without memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    support = triton_support()
    if support.name != "gpu":
        print(f"moe_kernels.bench needs an NVIDIA GPU: {support.reason}", file=sys.stderr)
        return 2
    try:
        peers = load_peers(options.layer, options.plan)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    measure = chosen(options)
    content: dict[str, Any] = {"environment": device_report(), "rows": []}
    for name in options.shapes:
        try:
            row = measure(name, SHAPES[name], options.dtype, peers)
        except Exception as error:  # noqa: BLE001 - arrays that do not fit must not end hours
            print(f"{name}: left out: {first_line(error)}", flush=True)
            continue
        show(row)
        content["rows"].append(row)
        write_json(options.json, content)
    if options.plot and measure.func is measure_layers:
        draw(content["rows"], options.plot)
    return 0 if content["rows"] else 1


def chosen(options: argparse.Namespace) -> partial[dict[str, Any]]:
    """What the flags ask for, as a function of a name, a shape, a dtype and peers."""
    if options.tune:
        return partial(tune, rounds=TUNING_ROUNDS)
    if options.decode:
        return partial(measure_decoding, rounds=options.rounds)
    if options.launches:
        return partial(measure_launches, rounds=options.rounds)
    return partial(measure_layers, rounds=options.rounds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
