"""A run may become longer where its learning rate allows it."""

from dataclasses import asdict, replace

import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import OptimConfig, TrainConfig
from moe_jax.train.checks import check_same_run


def run(schedule, steps, continue_to=0):
    return TrainConfig(steps=steps, continue_to=continue_to, optim=OptimConfig(schedule=schedule))


def goes_on(tmp_path, old, new, step):
    check_same_run(new, {"config": asdict(old), "step": step}, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "step"),
    [
        (("constant", 600), ("constant", 1000), 600),
        (("constant", 1000), ("constant", 600), 500),
        (("wsd", 600), ("wsd", 1000), 480),
        (("cosine", 600), ("cosine", 600, 1000), 600),
        (("cosine", 600), ("cosine", 600, 1000), 300),
        (("cosine", 600, 1000), ("cosine", 600, 1500), 600),
        (("cosine", 600, 1000), ("cosine", 600), 600),
        (("wsd", 600, 1000), ("wsd", 600, 2000), 800),
        (("constant", 600, 1000), ("constant", 600, 2000), 1000),
    ],
)
def test_a_run_becomes_longer_where_its_past_stays_true(tmp_path, old, new, step):
    goes_on(tmp_path, run(*old), run(*new), step)


@pytest.mark.parametrize(
    ("old", "new", "step", "message"),
    [
        (("cosine", 600), ("cosine", 1000), 300, "give --steps 600 --continue-to N"),
        (("wsd", 600), ("wsd", 1000), 481, "give --steps 600 --continue-to N"),
        (("cosine", 600, 1000), ("cosine", 600, 1500), 601, "--steps 600 --continue-to N"),
        (("cosine", 600, 1000), ("cosine", 600), 700, "at step 700 of 1000, beyond the 600"),
        (("constant", 600), ("constant", 1000), None, "give --steps 600 --continue-to N"),
    ],
)
def test_it_does_not_where_the_past_would_have_been_another(tmp_path, old, new, step, message):
    with pytest.raises(UserError) as refused:
        goes_on(tmp_path, run(*old), run(*new), step)
    assert message in str(refused.value)
    assert "remove" not in str(refused.value)


def test_other_settings_are_refused_as_before(tmp_path):
    old = run("constant", 600)
    with pytest.raises(UserError, match=r"holds a run with seed=0, not 1: choose another --out$"):
        goes_on(tmp_path, old, replace(old, seed=1), 600)
