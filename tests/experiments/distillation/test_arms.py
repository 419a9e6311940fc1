"""What the byte-level arms cost, and which seeds they have."""

import numpy as np

from experiments.distillation import arms
from experiments.distillation.arms import ARMS, Arm, Settings


def test_equal_flops_are_equal():
    """The longer run from scratch costs what teacher and taught student cost together."""
    settings = Settings()
    long = arms.arm_config("scratch_equal_flops", settings)
    spent = long.steps * arms.flops_per_token(ARMS["scratch_equal_flops"], long)
    student = arms.arm_config("kd", settings)
    teacher = arms.arm_config("teacher", settings)
    together = student.steps * arms.flops_per_token(ARMS["kd"], student)
    together += teacher.steps * arms.flops_per_token(ARMS["teacher"], teacher)
    np.testing.assert_allclose(spent, together, rtol=2e-3)
    plain = arms.flops_per_token(Arm(), student)
    taught = arms.flops_per_token(ARMS["kd"], student)
    assert taught > plain
    # Half of the batches are written: half a forward pass more, a third of an update.
    written = arms.flops_per_token(ARMS["kd_on_policy"], student)
    np.testing.assert_allclose(written - taught, plain / 6)


def test_costly_arms_may_have_fewer_seeds():
    fewer = Settings(seeds=3, costly_seeds=2)
    assert arms.seeds_of("kd_on_policy", fewer) == [0, 1]
    assert arms.plan(fewer)["kd"] == [0, 1, 2]
