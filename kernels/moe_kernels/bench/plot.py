"""A plot of the benchmark's rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_kernels.bench.measure import GEMM

CALLS = ("grouped gemm", "triton forward", "triton backward", "xla forward", "xla backward")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Fractions of the plain GEMM's rate, a group of bars for each layer. Writes a PNG."""
    from matplotlib.figure import Figure  # slow to import, and needed with --plot only

    calls = [call for call in CALLS if any(call in row["calls"] for row in rows)]
    figure = Figure(figsize=(10, 1.5 + 0.7 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for index, call in enumerate(calls):
        values = [row["calls"].get(call, {}).get("of_gemm", 0.0) for row in rows]
        centre = (len(calls) - 1) / 2
        axes.barh(np.arange(len(rows)) + 0.16 * (index - centre), values, 0.15, label=call)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.axvline(1.0, color="0.5", linestyle="--")
    axes.set_xlabel(f"useful FLOP/s over those of a {GEMM}^3 GEMM in the same rounds")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
