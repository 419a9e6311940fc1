"""What the schedule alone says of marin's times."""

import pytest

from moe_jax.study.pipeline_choice.published import explained


def test_marins_times():
    """GPipe: (M + P - 1) / M. One stage at a time: P."""
    rows = {row.name: row for row in explained()}
    gpipe = rows["GPipe order, P=8, M=16"]
    assert gpipe.schedule == pytest.approx(23 / 16)
    assert gpipe.serial == 8
    # F + Bi + W is 5 F where FSDP has 3 F: M (F + Bi + W) + (P - 1)(F + Bi - W) in 3 F.
    assert rows["ZB-H1, P=8, M=8"].schedule == pytest.approx((8 * 5 + 7 * 1) / 24, rel=0.2)
