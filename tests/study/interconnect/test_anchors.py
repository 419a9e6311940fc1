"""What others measured, and how far the prediction is from it."""

from moe_jax.study.interconnect.anchors import anchors


def test_one_layer_is_within_a_third():
    """Of the layers of 8 H100, which have no more than experts and their exchange."""
    layers = [anchor for anchor in anchors() if " layer, " in anchor.name]
    assert len(layers) == 8
    assert all(2 / 3 < anchor.predicted / anchor.measured < 4 / 3 for anchor in layers)
