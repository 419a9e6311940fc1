"""Which replica of an expert computes a token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.moe.plan import make_plan
from moe_jax.moe.replicas import slots_of_experts

E = 4
SLOTS = np.array([2, 0, 1, 2, 3, 2])
"""Expert 2 has three replicas."""


@partial(jax.jit, static_argnums=1)
def chosen_slots(experts, capacity, first):
    plan = make_plan(experts, E, capacity)
    return plan.experts, slots_of_experts(plan, jnp.asarray(SLOTS), first)


@pytest.mark.parametrize(("capacity", "first"), [(None, 0), (None, 1), (None, 5), (3, 1)])
def test_an_experts_tokens_are_spread_evenly_over_its_slots(capacity, first):
    experts = np.random.default_rng(first).integers(0, E + 1, (13, 2))  # E: no expert
    experts[:, 0] = 2  # the hot one
    kept, chosen = map(np.asarray, chosen_slots(experts, capacity, first))
    assert (chosen[kept == E] == len(SLOTS)).all()
    assert (SLOTS[chosen[kept < E]] == kept[kept < E]).all()
    loads = np.bincount(chosen[kept == 2], minlength=len(SLOTS))[SLOTS == 2]
    assert loads.max() - loads.min() <= 1
    # An expert's first token goes to its replica number `first`.
    token = np.flatnonzero((kept == 2).any(axis=1))[0]
    assert chosen[token][kept[token] == 2][0] == np.flatnonzero(SLOTS == 2)[first % 3]
