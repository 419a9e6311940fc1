"""Where a curve first reaches a loss."""

from experiments.distillation.curves import Curve, first_below


def test_first_below_interpolates():
    curve = Curve([10, 20, 30], [3.0, 2.0, 1.5])
    assert first_below(curve, 2.5) == 15
    assert first_below(curve, 1.5) == 30
    assert first_below(curve, 4.0) == 10  # it began below
    assert first_below(curve, 1.0) is None
