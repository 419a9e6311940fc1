"""Curves of held-out loss over updates, one for each arm and seed."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import TrainConfig
from moe_jax.study.arms import Run, Runs
from moe_jax.train.state import TrainState


class Curve(NamedTuple):
    """Held-out bits per byte after so many updates."""

    steps: list[int]
    bits: list[float]
    traits: dict[str, Any] = {}  # noqa: RUF012
    """traits.py's numbers of the trained student, for arms that are examined."""


Curves = dict[str, list[Curve]]
"""For each arm, one for each seed."""


def curves_of(runs: Runs) -> Curves:
    """The runs of study.arms.run_arms, which are the fields of curves."""
    return {arm: [Curve(**run) for run in of_arm] for arm, of_arm in runs.items()}


def curve_summary(run: Run) -> str:
    """A finished run in its progress line."""
    return f"{run['steps'][-1]:5} updates  {run['bits'][-1]:.4f} bits per byte"


def train_curve(
    config: TrainConfig,
    state: TrainState,
    update: Callable[[TrainState, Any, int], TrainState],
    batches: Iterator[Any],
    evaluate: Callable[[Any], float],
) -> tuple[Curve, TrainState]:
    """(curve, state) of config.steps updates, evaluated every config.evaluate_every.

    update(state, batch, step) counts its steps from 1.
    """
    curve = Curve([], [])
    for step, batch in zip(range(1, config.steps + 1), batches, strict=False):
        state = update(state, batch, step)
        if step % config.evaluate_every == 0 or step == config.steps:
            curve.steps.append(step)
            curve.bits.append(evaluate(state))
    return curve, state


def first_below(curve: Curve, bits: float) -> float | None:
    """Updates after which the curve is first at `bits`, or None if it never is.

    Between two evaluations the curve is a straight line. A curve that begins below `bits` counts
    from its first evaluation, so a ratio made of it is a lower bound.
    """
    for index, value in enumerate(curve.bits):
        if value <= bits:
            if index == 0:
                return float(curve.steps[0])
            begin = curve.bits[index - 1]
            share = (begin - bits) / (begin - value)
            return curve.steps[index - 1] + share * (curve.steps[index] - curve.steps[index - 1])
    return None


def final(curves: Curves, arm: str) -> np.ndarray:
    """float[seeds]: bits per byte at the end."""
    return np.array([curve.bits[-1] for curve in curves[arm]])


def lowest(curves: Curves, arms: Iterable[str]) -> str:
    """The arm of the lowest mean loss at the end."""
    present = [arm for arm in arms if arm in curves]
    return min(present, key=lambda arm: float(final(curves, arm).mean()))


def trait(curves: Curves, arm: str, key: str) -> np.ndarray:
    """One of an arm's traits: float[seeds], or float[seeds, blocks]."""
    return np.array([curve.traits[key] for curve in curves[arm]])
