"""Replays a routing trace through every placement policy and budget, beside Belady's optimum."""

from typing import NamedTuple

import numpy as np

from moe_jax.placement.place import Placement, Scope, Step, belady, replay
from moe_jax.placement.policy import ONLINE, make_policy
from moe_jax.placement.trace import Trace

BUDGETS = (0.05, 0.1, 0.25, 0.5, 0.75)
"""Resident experts as a part of all of them."""
WARM_UP = 0.2
"""First part of the trace, which warms the policies up and is not scored."""
SCOPES: tuple[Scope, ...] = ("pool", "quota")

Rates = dict[tuple[str, Scope], list[float]]
"""Hit rates at BUDGETS by policy and scope."""


class Replays(NamedTuple):
    """Every policy's hit rates, and the highest that are possible."""

    rates: Rates
    belady: list[float]
    """At BUDGETS."""


def replay_all(trace: Trace) -> Replays:
    """Hit rates at BUDGETS of every policy and scope, and Belady's."""
    cut = int(WARM_UP * len(trace.chosen))
    warm_up = trace.part(0, cut)
    warm_up_steps = warm_up.steps()
    steps = trace.part(cut).steps()
    size = trace.layers * trace.experts

    def hit_rate(name: str, scope: Scope, residents: int) -> float:
        # The static policy counts uses in the warm-up alone: it may not see what it is scored on.
        policy = make_policy(name, size, trace.layers, warm_up.frequency())
        placement = Placement(policy, trace.layers, trace.experts, residents, scope)
        if name == "static":
            placement.fill()
        replay(placement, warm_up_steps)
        return replay(placement, steps).hit_rate

    residents = [round(budget * size) for budget in BUDGETS]
    rates: Rates = {
        (name, scope): [hit_rate(name, scope, count) for count in residents]
        for name in ("static", *ONLINE)
        for scope in SCOPES
    }
    return Replays(rates, [_belady_rate(trace, steps, count) for count in residents])


def _belady_rate(trace: Trace, steps: list[Step], residents: int) -> float:
    return belady(steps, trace.layers, trace.experts, residents).hit_rate


def best_online(rates: Rates, index: int) -> tuple[str, Scope]:
    """The policy that learns as it goes with the most hits at one budget."""
    return max((key for key in rates if key[0] != "static"), key=lambda key: rates[key][index])


def shared_between_domains(trace: Trace) -> float:
    """How much of a domain's most used quarter of experts is in another domain's quarter, too.

    The mean over pairs of domains: 1 without drift, 0.25 for unrelated domains.
    """
    hot = []
    quarter = trace.layers * trace.experts // 4
    for domain in np.unique(trace.domain):
        own = trace.chosen[trace.domain == domain]
        part = Trace(own, np.zeros(len(own), np.int16), trace.experts, ("one",))
        hot.append(set(np.argsort(-part.frequency(), kind="stable")[:quarter].tolist()))
    pairs = [(a, b) for i, a in enumerate(hot) for b in hot[i + 1 :]]
    return float(np.mean([len(a & b) / quarter for a, b in pairs])) if pairs else 1.0
