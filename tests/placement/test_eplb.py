"""Placement of experts by load: DeepSeek's golden case, a plain reference, and what must hold."""

import math
from collections import Counter
from itertools import combinations_with_replacement, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_jax.base.errors import UserError
from moe_jax.placement import eplb
from moe_jax.placement.eplb import (
    device_loads,
    imbalance,
    placement_of,
    rebalance,
    replicate,
)
from moe_jax.placement.eplb_steps import copies_between, improve

GOLDEN_WEIGHTS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_golden_case():
    """The example of deepseek-ai/EPLB's README, with a tie in its second layer."""
    found = rebalance(GOLDEN_WEIGHTS, replicas=16, groups=4, nodes=2, devices=8)
    assert found.physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert imbalance(device_loads(GOLDEN_WEIGHTS, found, 8)) == pytest.approx(
        [1.208, 1.242], abs=0.0005
    )
    assert found.counts[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    assert found.logical_to_physical.shape == (2, 12, 2)
    assert found.logical_to_physical[0, 0].tolist() == [12, -1]


def plain_packing(weights, packs):
    """(pack, rank in the pack) of every item, as the original's text says it."""
    room = len(weights) // packs
    if room == 1:
        return [(item, 0) for item in range(len(weights))]
    total = [np.float32(0)] * packs
    size = [0] * packs
    found = [(0, 0)] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        pack = min((p for p in range(packs) if size[p] < room), key=lambda p: total[p])
        found[item] = (pack, size[pack])
        total[pack] += weights[item]
        size[pack] += 1
    return found


def plain_layer(weights, replicas, groups, nodes, devices):
    """The original algorithm for one layer: [(expert, number of the replica)] of every slot."""
    if groups % nodes:
        groups, nodes = 1, 1
    weights = [np.float32(w) for w in weights]
    size = len(weights) // groups
    sums = [np.sum(np.array(weights[g * size : (g + 1) * size])) for g in range(groups)]
    group_place = plain_packing(sums, nodes)
    slots = []
    for node in range(nodes):
        own = sorted((rank, g) for g, (n, rank) in enumerate(group_place) if n == node)
        experts = [g * size + i for _, g in own for i in range(size)]
        items = [(e, 0) for e in experts]
        counts = dict.fromkeys(experts, 1)
        while len(items) < replicas // nodes:
            hot = max(experts, key=lambda e: weights[e] / np.float32(counts[e]))
            items.append((hot, counts[hot]))
            counts[hot] += 1
        shares = [weights[e] / np.float32(counts[e]) for e, _ in items]
        places = plain_packing(shares, devices // nodes)
        by_place = sorted(zip(places, items, strict=True))
        slots += [item for _, item in by_place]
    return slots


@st.composite
def problems(draw):
    """(weights, replicas, groups, nodes, devices) that can be placed."""
    nodes = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 3, 4, 6]))
    devices = nodes * draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 4))
    per_device = draw(st.integers(1, 5))
    replicas = devices * per_device
    own = nodes if groups % nodes == 0 else 1
    assume(experts <= replicas <= experts * devices // own)
    assume(experts % own == 0)
    # Few different loads, so that there are ties.
    load = st.one_of(st.integers(0, 4), st.integers(0, 1000))
    weights = draw(
        st.lists(st.lists(load, min_size=experts, max_size=experts), max_size=2, min_size=1)
    )
    return np.array(weights), replicas, groups, nodes, devices


def on_devices(row, devices):
    return np.asarray(row).reshape(devices, -1).tolist()


@settings(deadline=None, max_examples=120)
@given(problems())
def test_it_is_the_original_wherever_that_has_no_replica_twice(problem):
    weights, replicas, groups, nodes, devices = problem
    found = rebalance(*problem)
    for layer, row in enumerate(weights):
        slots = plain_layer(row, replicas, groups, nodes, devices)
        experts = [e for e, _ in slots]
        if all(len(set(one)) == len(one) for one in on_devices(experts, devices)):
            assert found.physical_to_logical[layer].tolist() == experts
            for slot, (expert, rank) in enumerate(slots):
                assert found.logical_to_physical[layer, expert, rank] == slot


def check_placement(placement, experts, devices):
    """Each expert at least once, none twice on a device, and the three arrays say the same."""
    for physical, logical, counts in zip(*placement, strict=True):
        assert Counter(physical.tolist()) == {e: n for e, n in enumerate(counts.tolist()) if n}
        assert counts.min() >= 1
        assert len(counts) == experts
        for expert, slots in enumerate(logical.tolist()):
            there = slots[: counts[expert]]
            assert slots[counts[expert] :] == [-1] * (len(slots) - counts[expert])
            assert sorted(there) == np.flatnonzero(physical == expert).tolist()
        for device in on_devices(physical, devices):
            assert len(set(device)) == len(device)


@settings(deadline=None, max_examples=80)
@given(problems())
def test_placements_are_whole_and_no_device_has_an_expert_twice(problem):
    weights, _, groups, nodes, devices = problem
    found = rebalance(*problem)
    check_placement(found, weights.shape[1], devices)
    if groups % nodes == 0:
        size = weights.shape[1] // groups
        for row in found.physical_to_logical:
            by_node = [set((np.array(node) // size).tolist()) for node in on_devices(row, nodes)]
            assert sum(map(len, by_node)) == groups


@settings(deadline=None, max_examples=60)
@given(problems())
def test_all_load_is_somewhere(problem):
    weights, _, _, _, devices = problem
    loads = device_loads(weights, rebalance(*problem), devices)
    assert loads.sum(-1) == pytest.approx(weights.sum(-1))
    assert (imbalance(loads) >= 1 - 1e-9).all()


def test_a_very_hot_expert_is_on_every_device_once():
    """The original gives it five of the eight slots, two of them on one device."""
    weights = [1000, 1, 1, 1]
    original = [e for e, _ in plain_layer(weights, 8, 1, 1, 4)]
    assert Counter(original)[0] == 5
    found = rebalance(np.array([weights]), replicas=8, groups=1, nodes=1, devices=4)
    assert found.counts[0, 0] == 4
    check_placement(found, 4, 4)


def test_an_item_whose_label_is_in_all_open_packs_gets_room(monkeypatch):
    """Loads for which the heaviest items fill the packs that the last one would need."""
    make_room = eplb._make_room
    calls = []
    monkeypatch.setattr(eplb, "_make_room", lambda *a: calls.append(make_room(*a)))
    random = np.random.default_rng(0)
    for _ in range(300):
        weights = random.integers(0, 5, (1, 3)).astype(float)
        check_placement(rebalance(weights, replicas=6, groups=1, nodes=1, devices=3), 3, 3)
    assert len(calls) > 10, "no case needed it"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(0, 4))
def test_replicas_make_the_highest_share_as_low_as_it_can_be(loads, further):
    """Against trying every way to hand out the further slots."""
    own = replicate(np.array(loads, np.float32), len(loads) + further)
    counts = np.bincount(own, minlength=len(loads))
    ways = combinations_with_replacement(range(len(loads)), further)
    best = min(
        max(load / (1 + way.count(e)) for e, load in enumerate(loads)) for way in map(list, ways)
    )
    assert max(np.array(loads) / counts) == pytest.approx(best)


ERRORS = [
    (([[1.0] * 4], 8, 3, 1, 4), "4 experts do not divide into 3 groups"),
    (([[1.0] * 4], 8, 1, 3, 4), "4 devices do not divide over 3 nodes"),
    (([[1.0] * 4], 9, 1, 1, 4), "9 replicas do not divide over 4 devices"),
    (([[1.0] * 8], 4, 1, 1, 4), "4 replicas are fewer than the 8 experts"),
    (([[1.0] * 2], 12, 1, 1, 4), "some device would have two of one expert"),
    (([[1.0] * 4], 12, 2, 2, 4), "some device would have two of one expert"),
    (([[1.0, -1.0]], 2, 1, 1, 1), "negative or not finite"),
    (([[1.0, math.nan]], 2, 1, 1, 1), "negative or not finite"),
    (([1.0, 2.0], 2, 1, 1, 1), "not \\[layers, E\\]"),
    (([[1.0] * 4], 0, 1, 1, 4), "must be positive"),
]


@pytest.mark.parametrize(("arguments", "words"), ERRORS)
def test_impossible_sizes_are_one_line(arguments, words):
    weights, *sizes = arguments
    with pytest.raises(UserError, match=words) as error:
        rebalance(np.array(weights), *sizes)
    assert "\n" not in str(error.value)


def test_a_placement_without_an_expert_is_refused():
    with pytest.raises(UserError, match=r"\[\[0, 1\]\] are in no slot"):
        placement_of(np.array([[0, 0, 2, 2]]), 3)
    with pytest.raises(UserError, match="experts 0 … 3 are not in 0 … 2"):
        placement_of(np.array([[0, 1, 2, 3]]), 3)


@settings(deadline=None, max_examples=60)
@given(problems(), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_a_bounded_plan_keeps_its_bound_and_never_makes_it_worse(problem, most, seed):
    weights, _, groups, nodes, devices = problem
    before = rebalance(*problem)
    changed = np.random.default_rng(seed).permutation(weights, axis=1)
    nodes = nodes if groups % nodes == 0 else 1
    after, copies = improve(changed, before, nodes, devices, most)
    check_placement(after, weights.shape[1], devices)
    assert (copies <= most).all()
    own = [before.physical_to_logical, after.physical_to_logical]
    assert copies.tolist() == copies_between(*own, devices).tolist()
    highest = [device_loads(changed, one, devices).max(-1) for one in (before, after)]
    assert (highest[1] <= highest[0] + 1e-9).all()
    for one, other in zip(*own, strict=True):
        nodes_of = [[set(n) for n in on_devices(row, nodes)] for row in (one, other)]
        assert nodes_of[0] == nodes_of[1]


def test_no_copies_change_nothing():
    before = rebalance(GOLDEN_WEIGHTS, 16, 4, 2, 8)
    after, copies = improve(GOLDEN_WEIGHTS[::-1], before, 2, 8, 0)
    assert after.physical_to_logical.tolist() == before.physical_to_logical.tolist()
    assert copies.tolist() == [0, 0]


def test_one_copy_is_the_best_one():
    """Against trying every expert in every slot."""
    weights = np.array([[8.0, 1.0, 1.0, 2.0, 3.0]])
    before = placement_of(np.array([[0, 1, 2, 3, 4, 3]]), 5)
    after, copies = improve(weights, before, 1, 3, 1)
    assert copies.tolist() == [1]

    def highest(slots):
        return device_loads(weights, placement_of(np.array([slots]), 5), 3).max()

    start = before.physical_to_logical[0].tolist()
    found = []
    for slot, expert in product(range(6), range(5)):
        trial = [*start[:slot], expert, *start[slot + 1 :]]
        whole = set(trial) == set(range(5))
        if whole and all(len(set(d)) == 2 for d in on_devices(trial, 3)):
            found.append(highest(trial))
    assert device_loads(weights, after, 3).max() == min(found)


def test_several_devices_with_the_highest_load_are_relieved():
    """The first step lowers one of two equal devices, so the highest load stays for the moment."""
    weights = np.array([[3, 3, 3, 3, 0, 0, 0, 0]])
    before = placement_of(np.arange(8)[None], 8)
    loads = [
        device_loads(weights, improve(weights, before, 1, 4, copies).placement, 4)[0].tolist()
        for copies in (0, 2, 4)
    ]
    assert [max(one) for one in loads] == [6, 6, 3]
    assert sorted(loads[1]) == [0, 3, 3, 6]


def test_many_copies_come_near_a_new_plan():
    """From the placement of other loads, steps reach almost what a plan from nothing has."""
    random = np.random.default_rng(0)
    weights = random.zipf(1.5, (4, 16)).clip(max=200)
    other = random.permutation(weights, axis=1)
    stale = rebalance(other, 24, 1, 1, 8)
    fresh = imbalance(device_loads(weights, rebalance(weights, 24, 1, 1, 8), 8))
    few = imbalance(device_loads(weights, improve(weights, stale, 1, 8, 4).placement, 8))
    many = imbalance(device_loads(weights, improve(weights, stale, 1, 8, 100).placement, 8))
    start = imbalance(device_loads(weights, stale, 8))
    assert (many <= few).all()
    assert few.mean() < 0.7 * start.mean()
    assert many.mean() < 1.1 * fresh.mean()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": 3}, "do not divide"),
        ({"devices": 0}, "must be positive"),
        ({"most_copies": -1}, "most_copies is -1"),
        ({"weights": GOLDEN_WEIGHTS[:1]}, "weights have shape"),
        ({"weights": -GOLDEN_WEIGHTS}, "negative"),
    ],
)
def test_an_impossible_plan_is_one_line(change, words):
    placement = rebalance(GOLDEN_WEIGHTS, 16, 4, 2, 8)
    values = {"weights": GOLDEN_WEIGHTS, "nodes": 2, "devices": 8, "most_copies": 4} | change
    with pytest.raises(UserError, match=words):
        improve(placement=placement, **values)


def test_an_idle_layer_is_even():
    assert imbalance(np.zeros((1, 4))).tolist() == [1.0]
    found = rebalance(np.zeros((1, 4)), 8, 1, 1, 4)
    check_placement(found, 4, 4)
