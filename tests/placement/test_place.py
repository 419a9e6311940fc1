"""Policies and placement against slow obvious references, and Belady against trying everything."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.base.errors import UserError
from moe_jax.placement.place import Placement, belady, replay
from moe_jax.placement.policy import LFRU, LFU, LRU, ONLINE, DecayedLFU, Static, make_policy

LAYERS, EXPERTS = 2, 4
NAMES = ["static", *ONLINE]


@st.composite
def traces(draw, longest=30):
    """Steps of alternating layers, each with some distinct experts in ascending order."""
    count = draw(st.integers(1, longest))
    chosen = st.sets(st.integers(0, EXPERTS - 1), min_size=1, max_size=3)
    return [(i % LAYERS, np.array(sorted(draw(chosen)))) for i in range(count)]


def make(name, capacity, scope="pool"):
    policy = make_policy(name, LAYERS * EXPERTS, LAYERS, np.arange(LAYERS * EXPERTS) % 5)
    return Placement(policy, LAYERS, EXPERTS, capacity, scope)


def decayed(uses, now):
    return sum(2.0 ** (-(now - t) / 64.0) for t in uses)


def slow_chance(expert, history):
    """How often `expert` followed on what its layer used last, from all steps so far."""
    layer = expert // EXPERTS
    own = [ids for step_layer, ids in history if step_layer == layer]
    if not own:
        return 0.0

    def followed(before):
        counts = dict.fromkeys(range(layer * EXPERTS, (layer + 1) * EXPERTS), 1 / EXPERTS)
        for ids, after in pairwise(own):
            for e in after if before in ids else []:
                counts[e] += 1
        return counts[expert] / sum(counts.values())

    return sum(followed(before) for before in own[-1])


def slow_score(name, expert, uses, now, history):
    """Score of one expert from the list of the steps of its uses (numbered from 1)."""
    if name == "lru":
        return max(uses, default=0)
    if name == "lfu":
        return len(uses)
    if name == "decayed_lfu":
        return decayed(uses, now)
    if name == "successor":
        return LAYERS * np.log(2) / 64 * decayed(uses, now) + slow_chance(expert, history)
    assert name == "lfru"
    return len(uses) / (1 + now - max(uses, default=0))


@settings(deadline=None, max_examples=60)
@given(
    traces(), st.sampled_from(list(ONLINE)), st.integers(0, 9), st.sampled_from(["pool", "quota"])
)
def test_every_policy_follows_its_definition(steps, name, capacity, scope):  # noqa: C901, PLR0915
    """A reference that keeps lists and looks at everything at each step."""
    placement = make(name, capacity, scope)
    uses = {e: [] for e in range(LAYERS * EXPERTS)}
    resident: set[int] = set()
    history = []
    margin = 1.25 if name == "lfru" else 1.0
    for now, (layer, experts) in enumerate(steps, 1):
        ids = [layer * EXPERTS + int(e) for e in experts]
        for e in ids:
            uses[e].append(now)
        history.append((layer, ids))
        score = {e: slow_score(name, e, uses[e], now, history) for e in uses}
        expected_hits = [e for e in ids if e in resident]
        for e in ids:
            if e in resident or e in expected_hits:
                continue
            rivals = [r for r in sorted(resident) if scope == "pool" or r // EXPERTS == layer]
            room = min(capacity, 8)
            if scope == "quota":
                room = min(room // LAYERS + (layer < room % LAYERS), EXPERTS)
            if len(rivals) < room:
                resident.add(e)
            elif rivals:
                weakest = min(rivals, key=lambda r: (score[r], r))
                if score[e] > margin * score[weakest] * (1 + 1e-12):
                    resident -= {weakest}
                    resident.add(e)
        before = set(np.flatnonzero(placement.resident).tolist())
        change = placement.use(layer, experts)
        after = set(np.flatnonzero(placement.resident).tolist())
        assert change.hits.tolist() == expected_hits
        assert after == resident
        assert after == (before | set(change.admitted)) - set(change.evicted)
        assert not set(change.admitted) & before
        assert set(change.evicted) <= before


@settings(deadline=None, max_examples=60)
@given(
    traces(),
    st.sampled_from(NAMES),
    st.integers(0, 9),
    st.sampled_from(["pool", "quota"]),
    st.booleans(),
)
def test_capacity_is_exact_and_belady_is_never_beaten(steps, name, capacity, scope, warm):
    placement = make(name, capacity, scope)
    if name == "static" or warm:
        placement.fill()
    hits = 0
    for layer, experts in steps:
        hits += len(placement.use(layer, experts).hits)
        assert placement.resident.sum() <= capacity
        if scope == "quota":
            for index in range(LAYERS):
                assert (
                    placement.resident[placement.room(index)[0]].sum() <= placement.room(index)[1]
                )
    assert hits <= belady(steps, LAYERS, EXPERTS, capacity).hits


@settings(deadline=None, max_examples=25)
@given(traces(longest=6), st.integers(1, 3))
def test_belady_equals_the_best_of_all_placements(steps, capacity):
    everything = range(LAYERS * EXPERTS)
    best = {frozenset(start): 0 for start in combinations(everything, capacity)}
    for layer, experts in steps:
        ids = {layer * EXPERTS + int(e) for e in experts}
        following: dict[frozenset, int] = {}
        for residents, hits in best.items():
            hits += len(residents & ids)
            for kept in combinations(sorted(residents | ids), capacity):
                key = frozenset(kept)
                following[key] = max(following.get(key, 0), hits)
        best = following
    assert belady(steps, LAYERS, EXPERTS, capacity).hits == max(best.values())


def test_everything_fits_or_nothing_does():
    steps = [(i % 2, np.array([0, 2])) for i in range(10)]
    for name in ONLINE:
        assert replay(make(name, 8), steps).hits == 16  # all but the first two steps
        assert replay(make(name, 0), steps).hits == 0
    assert belady(steps, LAYERS, EXPERTS, 8).hits == 20
    assert replay(make("lru", 3), []).hit_rate == 1.0


def test_static_never_moves_and_takes_the_most_frequent():
    frequency = np.array([5, 1, 0, 3, 9, 9, 0, 2])
    placement = Placement(Static(frequency), 2, 4, 3)
    assert placement.fill() == [0, 4, 5]
    for layer, experts in [(0, [1, 2, 3]), (1, [2, 3])] * 5:
        change = placement.use(layer, np.array(experts))
        assert change.admitted == change.evicted == []
    quota = Placement(Static(frequency), 2, 4, 3, "quota")
    assert quota.fill() == [0, 3, 4]


def test_room_is_made_by_the_lowest_scores_of_the_layers_own():
    place = Placement(Static(np.arange(8.0)), layers=2, experts=4, capacity=6, scope="quota")
    assert place.fill() == [1, 2, 3, 5, 6, 7]
    assert place.make_room(1, 2, keep=[5]) == [6, 7]
    assert place.make_room(0, 1, keep=[0, 2]) == [1]
    assert place.make_room(1, 2, keep=[5, 3]) == [2], "nobody else may go"
    pool = Placement(Static(np.arange(8.0)), layers=2, experts=4, capacity=6)
    pool.fill()
    assert pool.make_room(1, 2, keep=[4]) == [2, 3], "from any layer"


def test_hysteresis_holds_back_a_newcomer():
    for hysteresis, kept in ((0.0, 1), (1.0, 0)):
        placement = Placement(LFU(2, hysteresis), 1, 2, 1)
        for expert in (0, 0, 1, 1, 1):
            placement.use(0, np.array([expert]))
        assert np.flatnonzero(placement.resident).tolist() == [kept]


def test_decay_forgets_and_does_not_overflow():
    policy = DecayedLFU(2, half_life=2.0)
    for _ in range(50):
        policy.use(np.array([0]))
    for _ in range(5000):
        policy.use(np.array([1]))
    score = policy.score(np.array([0, 1]))
    assert score[0] < 1e-9
    assert score[1] == pytest.approx(1 / (1 - 2**-0.5))


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: make_policy("mru", 4), "unknown placement policy 'mru': use one of static, lru"),
        (lambda: make_policy("static", 4), "static needs a trace"),
        (lambda: Placement(LRU(4), 2, 3, 1), "for 4 experts, not 2 layers of 3"),
        (lambda: Placement(LRU(4), 2, 2, -1), "capacity is -1"),
        (lambda: LFRU(4, -0.5), "hysteresis is -0.5"),
    ],
)
def test_impossible_settings_are_named(make_it, message):
    with pytest.raises(UserError, match=message):
        make_it()
