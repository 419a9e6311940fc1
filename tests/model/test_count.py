import dataclasses

import jax
import pytest
from flax import nnx

from moe_jax.config.presets import PRESETS, PUBLISHED
from moe_jax.model.count import count_parameters, train_flops_per_token
from moe_jax.model.transformer import Transformer


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals_agree_to_one_percent(name):
    counts = count_parameters(PRESETS[name].resolved().model)
    assert counts.total / 1e9 == pytest.approx(PUBLISHED[name].total, rel=0.01)


def test_deepseek_v3_multi_token_prediction_is_the_published_11_5_billion():
    # README_WEIGHTS.md of the release: 11.5B unique parameters in the module
    counts = count_parameters(PRESETS["deepseek_v3"].resolved().model)
    assert counts.mtp / 1e9 == pytest.approx(11.5, rel=0.01)


def test_small_has_about_25_million():
    counts = count_parameters(PRESETS["small"].resolved().model)
    assert counts.total + counts.mtp == pytest.approx(25e6, rel=0.1)


def test_counts_by_hand(small_model):
    config = dataclasses.replace(small_model, mtp_depth=1)
    counts = count_parameters(config)
    d, attention = 20, 20 * (32 + 16 + 16) + 32 * 20
    dense = attention + 3 * d * 24 + 2 * d
    shared = attention + 3 * d * 14 + d * 6 + 2 * d
    expert = 3 * d * 14
    assert counts.total == 61 * d + dense + 2 * (shared + 6 * expert) + d
    assert counts.active == 61 * d + dense + 2 * (shared + 2 * expert) + d
    assert counts.mtp == shared + 6 * expert + 2 * d * d + 3 * d
    assert counts.total + counts.mtp == sum(
        leaf.size
        for leaf in jax.tree.leaves(
            nnx.state(Transformer(config, key=jax.random.key(0)), nnx.Param)
        )
    )


def test_flops_of_a_dense_layer_by_hand(small_model):
    config = dataclasses.replace(small_model, layers=1, dense_layers=1, tied_embedding=False)
    d, length = 20, 10
    products = 61 * d + d * (32 + 16 + 16) + 32 * d + 3 * d * 24 + 3 * d  # norms count as well
    attention = 6 * length * 4 * 16 / 2
    assert train_flops_per_token(config, length) == 6 * products + attention
