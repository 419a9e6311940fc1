"""The replay of a trace on placements of the window before, by hand and by its order."""

import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.placement.synthetic import ZipfMarkov, generate_trace
from moe_jax.study.expert_balance import Devices, mixed, replay_balance, window_loads

ZIPF = ZipfMarkov(
    layers=2, experts=16, per_token=2, domains=2, exponent=1.0, repeat=0.2, switch=0.002
)


def test_constant_loads_by_hand():
    loads = np.array([[[8, 4, 2, 2]]] * 3)
    found = replay_balance(loads, Devices(devices=2, spare=1), most_copies=2)
    # In order 12 and 4, packed 8+2 and 4+2, and with two replicas of the first two 8 and 8.
    assert found.before.tolist() == [[1.5], [1.5]]
    assert found.packed.tolist() == [[1.25], [1.25]]
    for values in (found.after, found.once, found.bounded, found.hindsight):
        assert values.tolist() == [[1.0], [1.0]]
    assert found.copies.tolist() == found.bounded_copies.tolist() == [[0]]


def test_the_window_before_decides():
    """Loads that move to another expert: the plan is one window late, hindsight is not."""
    loads = np.array([[[9, 9, 1, 1]], [[9, 1, 9, 1]], [[9, 1, 9, 1]]])
    found = replay_balance(loads, Devices(devices=2, spare=0), most_copies=2)
    assert (found.after[0, 0], found.hindsight[0, 0]) == (1.8, 1.0)
    assert found.after[1, 0] == found.hindsight[1, 0]
    assert found.once[1, 0] == found.once[0, 0]


def test_windows_count_every_use():
    trace = generate_trace(ZIPF, 250, seed=0)
    loads = window_loads(trace, 100)
    assert loads.shape == (2, 2, 16)
    assert (loads.sum(-1) == 100 * 2).all()
    assert loads.sum(0).ravel().tolist() == trace.part(0, 200).frequency().tolist()
    with pytest.raises(UserError, match="two windows of 200 are needed"):
        window_loads(trace, 200)


def test_skewed_loads_become_even_and_bounds_hold():
    loads = window_loads(generate_trace(ZIPF, 2000, seed=1), 200)
    found = replay_balance(loads, Devices(devices=8, spare=1), most_copies=1)
    means = {name: getattr(found, name).mean() for name in ("hindsight", "after", "before")}
    assert means["hindsight"] < means["after"] < 0.8 * means["before"]
    assert found.bounded_copies.max() <= 1
    assert found.copies.shape == found.bounded_copies.shape == (8, 2)
    assert found.copies.mean() > 2 * found.bounded_copies.mean()


def test_one_plan_has_no_copies():
    loads = window_loads(generate_trace(ZIPF, 200, seed=0), 100)
    found = replay_balance(loads, Devices(devices=4), most_copies=1)
    assert found.copies.shape == (0, 2)
    with pytest.raises(UserError, match="16 experts do not divide over 5 devices"):
        replay_balance(loads, Devices(devices=5), most_copies=1)


def test_mixing_keeps_sequences_whole():
    trace = generate_trace(ZIPF, 250, seed=0)
    other = mixed(trace, 40, seed=1)
    assert other.chosen[240:].tolist() == trace.chosen[240:].tolist()
    sequences = [part.tobytes() for part in trace.chosen[:240].reshape(6, -1)]
    shuffled = [part.tobytes() for part in other.chosen[:240].reshape(6, -1)]
    assert shuffled != sequences
    assert sorted(shuffled) == sorted(sequences)
