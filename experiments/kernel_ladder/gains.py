"""From times to speeds: over the rung before, over XLA's path, over ragged_dot, of a plain GEMM."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from experiments.kernel_ladder.ranges import Range, Step, covering, speed
from experiments.kernel_ladder.rungs import RUNGS, before
from moe_jax.base.result import Measurement

Rounds = Mapping[str, list[float]]
"""Seconds of each call, round by round."""

TRAIN = "train"
"""Forward and backward with all ideas, as a row beside the rungs, which are forward alone."""


class Gain(NamedTuple):
    """Speeds of one rung. None: it has nothing to be compared with."""

    over_xla: Range | None
    over_ragged_dot: Range | None
    over_before: Range | None
    """Over the rung that it is added to."""
    of_gemm: Range
    """Of the plain GEMM's rate, by useful FLOPs."""
    of_gemm_bound: float | None = None
    """What the model says it cannot pass. None where it is measured."""


Gains = dict[str, Gain]
"""By rung, and for TRAIN."""


def predicted_gains(steps: Mapping[str, Step], limit: float) -> Gains:
    """Speeds from predicted times. `limit` is the plain GEMM's time for the forward pass."""
    found = {}
    for rung in (rung for rung in RUNGS if rung.name in steps):
        step = steps[rung.name]
        if step.left_out:
            continue
        previous = steps.get(before(rung) or "")
        found[rung.name] = Gain(
            _over(step, steps, "xla", rung.name),
            _over(step, steps, "ragged_dot", rung.name),
            None if not previous or previous.left_out else step_gain(step, previous),
            Range(limit / step.seconds.high, limit / step.seconds.low),
            None if step.bound is None else limit / step.bound,
        )
    return found


def predicted_train(own: Step, peers: Mapping[str, Step], limit: float) -> Gain:
    """The speed of forward and backward. `limit` is the plain GEMM's time for the forward pass."""
    whole = 3 * limit  # backward has twice the FLOPs of forward
    return Gain(
        _over(own, peers, "xla", TRAIN),
        _over(own, peers, "ragged_dot", TRAIN),
        None,
        Range(whole / own.seconds.high, whole / own.seconds.low),
        None if own.bound is None else whole / own.bound,
    )


def _over(step: Step, steps: Mapping[str, Step], peer: str, name: str) -> Range | None:
    if peer not in steps or steps[peer].left_out:
        return None
    return Range(1.0, 1.0) if name == peer else speed(step.seconds, steps[peer].seconds)


def step_gain(step: Step, previous: Step) -> Range:
    """The gain of one idea.

    Two rungs of our kernels share whatever keeps them below the bound, so their bounds are
    compared, at both rates of L2. Any other two times know nothing of each other.
    """
    if step.bound_low_l2 and previous.bound_low_l2 and step.bound and previous.bound:
        return covering([previous.bound / step.bound, previous.bound_low_l2 / step.bound_low_l2])
    return speed(step.seconds, previous.seconds)


def measured_gains(seconds: Rounds) -> Gains:
    """Speeds from rounds, each from its lowest to its highest round. `gemm` is the plain GEMM for
    the layer's forward FLOPs."""
    found = {}
    for rung in (rung for rung in RUNGS if rung.name in seconds):
        own = seconds[rung.name]
        previous = before(rung)
        found[rung.name] = Gain(
            _by_round(own, seconds.get("xla")),
            _by_round(own, seconds.get("ragged_dot")),
            None if previous is None else _by_round(own, seconds.get(previous)),
            covering(gemm / t for t, gemm in zip(own, seconds["gemm"], strict=True)),
        )
    return found


def measured_train(seconds: Rounds) -> Gain:
    """The speed of forward and backward. `gemm` is the plain GEMM for the forward FLOPs."""
    own = seconds["raster train"]
    return Gain(
        _by_round(own, seconds.get("xla train")),
        _by_round(own, seconds.get("ragged_dot train")),
        None,
        covering(3 * gemm / t for t, gemm in zip(own, seconds["gemm"], strict=True)),
    )


def _by_round(own: list[float], other: list[float] | None) -> Range | None:
    if other is None:
        return None
    return covering(b / a for a, b in zip(own, other, strict=True))


def key(text: str) -> str:
    """A name for result.json."""
    return re.sub(r"\W+", "_", text).lower()


FIELDS = {
    "over_xla": ("", "x XLA's path", "xla"),
    "over_ragged_dot": ("_over_ragged_dot", "x jax.lax.ragged_dot", "ragged_dot"),
    "over_before": ("_over_before", "x the rung that it is added to", None),
    "of_gemm": ("_of_gemm", "of the plain GEMM's FLOP/s", "gemm"),
}
"""Of Gain: what follows the rung's name in result.json, the unit, and the baseline."""


def gain_measurements(shape: str, rung: str, gain: Gain, kind: str) -> list[Measurement]:
    """The ranges of one rung, a low and a high row each. `kind` is `measured` or `PREDICTED`."""
    rows = []
    for field, (suffix, unit, baseline) in FIELDS.items():
        found: Range | None = getattr(gain, field)
        for end in () if found is None else ("low", "high"):
            value = getattr(found, end)
            name = f"{key(f'{shape} {rung}')}{suffix}_{end}"
            rows.append(Measurement(name, value, f"{unit}, {kind}", baseline, value))
    if gain.of_gemm_bound is not None:
        unit = f"of the plain GEMM's FLOP/s at most, {kind}"
        name = f"{key(f'{shape} {rung}')}_of_gemm_bound"
        rows.append(Measurement(name, gain.of_gemm_bound, unit, "gemm", gain.of_gemm_bound))
    return rows


def recorded_gains(rows: Mapping[str, Measurement], shapes: Iterable[str]) -> dict[str, Gains]:
    """The gains of every shape, out of the measurements of a result.json."""
    return {
        shape: {
            name: _recorded(rows, key(f"{shape} {name}"))
            for name in (*(rung.name for rung in RUNGS), TRAIN)
            if key(f"{shape} {name}") + "_of_gemm_low" in rows
        }
        for shape in shapes
    }


def _recorded(rows: Mapping[str, Measurement], name: str) -> Gain:
    def read(field: str) -> Range | None:
        ends = [rows.get(f"{name}{FIELDS[field][0]}_{end}") for end in ("low", "high")]
        values = [float(row.value) for row in ends if row and row.value is not None]
        return Range(*values) if len(values) == 2 else None

    of_gemm = read("of_gemm")
    assert of_gemm
    bound = rows.get(f"{name}_of_gemm_bound")
    return Gain(
        read("over_xla"),
        read("over_ragged_dot"),
        read("over_before"),
        of_gemm,
        None if bound is None or bound.value is None else float(bound.value),
    )
