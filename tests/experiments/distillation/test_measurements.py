"""The arithmetic of the comparison, and the sentences that follow from it."""

import pytest

from experiments.distillation.arms import ARMS, Settings
from experiments.distillation.curves import Curve
from experiments.distillation.measurements import TRAITS, measurements
from experiments.distillation.verdict import verdict

THREE = Settings(seeds=3)


def curves(**finals):
    def curve_of(name, seed):
        bits = [finals.get(name, 2.0) + d + seed * 0.01 for d in (1, 0.5, 0)]
        if not ARMS[name].examined:
            return Curve([100, 200, 300], bits)
        same = 0.9 if ARMS[name].start == "upcycled" else 0.1
        own = {"own_text_bits": finals.get(name, 2.0)} if ARMS[name].alpha else {}
        fields = {key: [same, same, same] for key in TRAITS}
        return Curve([100, 200, 300], bits, fields | own)

    return {name: [curve_of(name, seed) for seed in range(3)] for name in ARMS}


def test_the_measurements():
    given_curves = curves(upcycled_kd=1.5, upcycled=1.4, scratch=2.0, teacher=1.6, kd_sampled=2.25)
    rows = {m.name: m for m in measurements(given_curves, THREE)}
    assert rows["tokens_to_scratch_loss_ratio"].value == pytest.approx(300 / 200)
    every = rows["flops_to_scratch_loss_ratio"].value
    given = rows["flops_to_scratch_loss_ratio_teacher_given"].value
    assert every < given < 300 / 200
    against = rows["student_minus_best_plain_bits"]
    assert against.baseline == "upcycled"
    assert against.value == pytest.approx(0.1)
    assert rows["student_minus_teacher_bits"].value == pytest.approx(-0.1)
    assert rows["kd_sampled_minus_kd_bits"].value == pytest.approx(0.25)
    assert rows["upcycled_minus_scratch_expert_output_cosine"].value == pytest.approx(0.8)
    own = rows["upcycled_kd_on_policy_minus_upcycled_kd_own_text_bits"]
    assert own.value == pytest.approx(0.5)
    sentence = verdict(rows)
    assert "+0.100 (significant)" in sentence
    assert "cosine of their outputs 0.90, from scratch 0.10" in sentence
    never = {m.name: m for m in measurements(curves(scratch=0.1), THREE)}
    assert never["tokens_to_scratch_loss_ratio"].value is None
    assert "No taught student" in verdict(never)


def test_arms_with_fewer_seeds_are_compared_on_those():
    given = curves(kd_on_policy=0.5)
    fewer = Settings(seeds=3, costly_seeds=2)
    for name in ("kd_on_policy", "upcycled_kd_on_policy"):
        del given[name][2:]
    rows = {m.name: m for m in measurements(given, fewer)}
    assert rows["kd_on_policy_minus_kd_bits"].seeds == [0, 1]
    best = rows["student_minus_teacher_bits"]
    assert best.seeds == [0, 1, 2]
    assert "on_policy" not in best.unit  # the lowest, but not of all seeds
