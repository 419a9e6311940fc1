"""What the papers say of each schedule, to compare with a simulation.

In the formulas P is the stages, M the micro-batches, v the chunks of a stage, B = Bi + W a whole
backward and F&B an overlapped pair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

ZERO_BUBBLE = "arXiv:2401.10241"
DUALPIPE = "deepseek-ai/DualPipe README"


class Costs(NamedTuple):
    """Times of a whole stage."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    overlapped: float = 3.0

    @property
    def backward(self) -> float:
        """B = Bi + W."""
        return self.backward_input + self.backward_weight


@dataclass(frozen=True)
class Published:
    """Closed forms for one schedule."""

    bubble: Callable[[int, int, Costs], float]
    """(P, v, costs) -> idle time of the worst device."""
    bubble_text: str
    peak: Callable[[int, int, int], float]
    """(P, M, v) -> activations of the worst device, in stage-micro-batches."""
    peak_text: str
    weights: int
    """Stages whose weights a device holds."""
    messages: Callable[[int, int, int], int]
    """(P, M, v) -> activations and gradients sent between devices in an update. The path of the
    schedule gives it. The zero-bubble repository says the same relative to 1F1B: 1, 1 and 2."""
    messages_text: str
    needs: str
    """For what the bubble is exact (docs/pipeline.md says what it is elsewhere)."""
    exact: Callable[[int, int, Costs], bool]
    """Whether (P, M, costs) are what `needs` says."""
    source: str


def _any_costs(P: int, M: int, c: Costs) -> bool:
    return True


def _short_weights(P: int, M: int, c: Costs) -> bool:
    return c.backward_weight <= min(c.forward, c.backward_input) and M >= P


def _equal_costs(P: int, M: int, c: Costs) -> bool:
    return c.forward == c.backward_input == c.backward_weight


def _dual_costs(P: int, M: int, c: Costs) -> bool:
    even = c.forward == c.backward_input >= c.backward_weight
    return even and c.backward <= c.overlapped <= c.forward + c.backward


def _one_way(P: int, v: int, c: Costs) -> float:
    return (P - 1) * (c.forward + c.backward) / v


def _dual(P: int, v: int, c: Costs) -> float:
    return (P / 2 - 1) * (c.overlapped + c.backward - 3 * c.backward_weight)


def _h1(P: int, v: int, c: Costs) -> float:
    return (P - 1) * (c.forward + c.backward_input - c.backward_weight)


def _h2(P: int, v: int, c: Costs) -> float:
    return (P - 1) * max(0.0, c.forward + c.backward_input - 2 * c.backward_weight)


EQUAL = "F = Bi = W"
WEIGHTS_SHORT = "W ≤ F, W ≤ Bi and M ≥ P"
DUAL_COSTS = "F = Bi ≥ W and B ≤ F&B ≤ F+B"

PUBLISHED: dict[str, Published] = {
    "gpipe": Published(
        bubble=_one_way,
        bubble_text="(P-1)(F+B)",
        peak=lambda P, M, v: M,
        peak_text="M",
        weights=1,
        messages=lambda P, M, v: 2 * M * (P - 1),
        messages_text="2M(P-1)",
        needs="nothing",
        exact=_any_costs,
        source="arXiv:1811.06965",
    ),
    "1f1b": Published(
        bubble=_one_way,
        bubble_text="(P-1)(F+B)",
        peak=lambda P, M, v: min(P, M),
        peak_text="min(P,M)",
        weights=1,
        messages=lambda P, M, v: 2 * M * (P - 1),
        messages_text="2M(P-1)",
        needs="nothing",
        exact=_any_costs,
        source="arXiv:2006.09503",
    ),
    "interleaved": Published(
        bubble=_one_way,
        bubble_text="(P-1)(F+B)/v",
        peak=lambda P, M, v: min(M, P * (1 + (P - 1) / (P * v))),
        peak_text="P(1+(P-1)/(Pv))",
        weights=1,
        messages=lambda P, M, v: 2 * M * (P * v - 1) if P > 1 else 0,
        messages_text="2M(Pv-1)",
        needs="nothing",
        exact=_any_costs,
        source="arXiv:2104.04473",
    ),
    "zb-h1": Published(
        bubble=_h1,
        bubble_text="(P-1)(F+Bi-W)",
        peak=lambda P, M, v: min(P, M),
        peak_text="min(P,M)",
        weights=1,
        messages=lambda P, M, v: 2 * M * (P - 1),
        messages_text="2M(P-1)",
        needs=WEIGHTS_SHORT,
        exact=_short_weights,
        source=ZERO_BUBBLE,
    ),
    "zb-h2": Published(
        bubble=_h2,
        bubble_text="(P-1)(F+Bi-2W)",
        peak=lambda P, M, v: 2 * P - 1,
        peak_text="2P-1",
        weights=1,
        messages=lambda P, M, v: 2 * M * (P - 1),
        messages_text="2M(P-1)",
        needs=WEIGHTS_SHORT,
        exact=_short_weights,
        source=ZERO_BUBBLE,
    ),
    "zb-v": Published(
        bubble=lambda P, v, c: 0.0,
        bubble_text="0",
        peak=lambda P, M, v: P,
        peak_text="P",
        weights=1,
        messages=lambda P, M, v: 4 * M * (P - 1),
        messages_text="4M(P-1)",
        needs=EQUAL,
        exact=_equal_costs,
        source=ZERO_BUBBLE,
    ),
    "dualpipe": Published(
        bubble=_dual,
        bubble_text="(P/2-1)(F&B+B-3W)",
        peak=lambda P, M, v: P + 1,
        peak_text="P+1",
        weights=2,
        messages=lambda P, M, v: 2 * M * (P - 1),
        messages_text="2M(P-1)",
        needs=DUAL_COSTS,
        exact=_dual_costs,
        source=DUALPIPE,
    ),
    "dualpipev": Published(
        bubble=_dual,
        bubble_text="(P/2-1)(F&B+B-3W)",
        peak=lambda P, M, v: P + 1,
        peak_text="P+1",
        weights=2,
        messages=lambda P, M, v: 2 * M * (P - 2),
        messages_text="2M(P-2)",
        needs=DUAL_COSTS,
        exact=_dual_costs,
        source=DUALPIPE,
    ),
}
"""Name of a schedule -> what is published of it."""
