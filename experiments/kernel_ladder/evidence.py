"""What predictions rest on: published kernels beside the model, and XLA's compiled programs."""

import json
from pathlib import Path

from moe_kernels.predict import H100

from experiments.kernel_ladder import calibration, compiled
from experiments.kernel_ladder.calibration import Band, Point
from experiments.kernel_ladder.cases import FIRST_RUN, QUICK
from experiments.kernel_ladder.compiled import Counts
from experiments.kernel_ladder.ragged_path import PUBLISHED
from moe_jax.base.files import write_atomically
from moe_jax.base.result import Measurement

CALIBRATION = Path(__file__).parent / "results/calibration.json"


class Evidence:
    """The calibration band and the counts.

    Both are made anew, and written to `out`, or read from their records.
    """

    def __init__(self, out: Path, *, calibrate: bool, count: bool, seed: int) -> None:
        self.points = new_calibration(out, seed) if calibrate else recorded_calibration()
        self.band: Band = calibration.band_of(self.points)
        self.counts: Counts = new_counts(out) if count else compiled.read_recorded()


def recorded_calibration() -> list[Point]:
    """The recorded table."""
    return calibration.points_from_json(json.loads(CALIBRATION.read_text()))


def new_calibration(out: Path, seed: int) -> list[Point]:
    """The table made anew, for the H100, whose figures are published."""
    points = calibration.calibrate(H100, seed)
    _write(out / "calibration.json", calibration.to_json(points, H100))
    return points


def new_counts(out: Path) -> Counts:
    """The counts made anew, by XLA's GPU compiler."""
    print(f"counting in programs that XLA compiles for an H100 ({compiled.COMPILER})", flush=True)
    counts = compiled.count_all({**QUICK, **FIRST_RUN})
    _write(out / "compiled_h100.json", compiled.to_json(counts))
    return counts


def _write(path: Path, content: object) -> None:
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def evidence_measurements(band: Band) -> list[Measurement]:
    """The calibration band and the published gains over ragged_dot."""
    rows = [
        Measurement(
            f"calibration_{kind}_{end}",
            getattr(getattr(band, kind), end),
            "published over the model's bound, PREDICTED rates are divided by it",
            "bound",
        )
        for kind in calibration.KINDS
        for end in ("low", "high")
    ]
    return rows + [
        Measurement(
            f"published_over_ragged_dot_{gain.name}",
            gain.ratio,
            f"x jax.lax.ragged_dot, published ({gain.source}): {gain.what}",
            "ragged_dot",
            gain.ratio,
        )
        for gain in PUBLISHED
    ]
