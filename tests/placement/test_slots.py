"""Placements while a run trains."""

import numpy as np
import pytest

from moe_jax.config import ExchangeConfig, MoEConfig, ParallelConfig
from moe_jax.placement.eplb import device_loads, imbalance, placement_of
from moe_jax.placement.slots import SlotPlanner

DEVICES = 4


def planner(replicas=4, moves=0, **settings):
    exchange = ExchangeConfig("copies", rebalance=1, replicas=replicas, moves=moves, **settings)
    moe = MoEConfig(experts=8, groups=4)
    return SlotPlanner.of(moe, ParallelConfig(expert=DEVICES, exchange=exchange))


def skewed(layers=3):
    loads = np.random.default_rng(0).integers(1, 20, (layers, 8))
    loads[:, 3] = 90
    return loads


def check_slots(slots, replicas):
    assert slots.shape[1] == 8 + replicas
    for layer in slots:
        assert set(layer.tolist()) == set(range(8))
        for own in layer.reshape(DEVICES, -1):
            assert len(set(own.tolist())) == len(own)  # no expert twice on a device


@pytest.mark.parametrize("replicas", [0, 4, 12, 24])
@pytest.mark.parametrize("moves", [0, 2])
def test_every_expert_is_somewhere_and_nowhere_twice(replicas, moves):
    plan = planner(replicas, moves)
    slots = plan.first(3)
    check_slots(slots, replicas)
    check_slots(plan.next(skewed(), slots), replicas)


def test_a_bound_on_moves_holds_and_the_load_falls():
    plan = planner(moves=2)
    slots = plan.first(3)

    def highest(slots):
        placement = placement_of(slots, 8)
        return imbalance(device_loads(skewed(), placement, DEVICES)).max()

    found = [highest(slots)]
    for _ in range(8):
        after = plan.next(skewed(), slots)
        assert plan.moved(slots, after) <= 2 * len(slots)
        slots = after
        found.append(highest(slots))
    assert sorted(found, reverse=True) == found
    assert found[-1] < 1.1 < 1.5 < found[0]
    unbounded = planner()
    first = unbounded.first(3)
    assert unbounded.moved(first, unbounded.next(skewed(), first)) > 2 * len(first)


def test_groups_stay_on_their_node():
    plan = planner(node=2)
    assert (plan.groups, plan.nodes) == (4, 2)
    for layer in plan.next(skewed(), plan.first(3)):
        first, second = ({e // 2 for e in node.tolist()} for node in layer.reshape(2, -1))
        assert not first & second
