"""Counts of a block against the model's own count, and by hand."""

from dataclasses import replace

import pytest

from moe_jax.config import ModelConfig
from moe_jax.config.attention import AttentionConfig
from moe_jax.config.moe import MoEConfig
from moe_jax.model.count import train_flops_per_token
from moe_jax.predict.layouts.block import block_of

GQA = ModelConfig(
    vocabulary=64,
    width=32,
    layers=3,
    dense_layers=0,
    attention=AttentionConfig(kind="gqa", heads=4, kv_heads=2, head_dim=8),
    moe=MoEConfig(experts=8, experts_per_token=2, expert_hidden=16, shared_experts=1),
)
MLA = replace(
    GQA,
    attention=AttentionConfig(
        kind="mla", heads=4, q_rank=12, kv_rank=10, nope_dim=8, rope_dim=4, v_dim=6
    ),
)


@pytest.mark.parametrize("config", [GQA, MLA], ids=["gqa", "mla"])
def test_flops_are_those_of_one_more_layer(config: ModelConfig):
    """train_flops_per_token counts a whole model, so a block is the difference of two models."""
    more = train_flops_per_token(config, 128)
    less = train_flops_per_token(replace(config, layers=2), 128)
    assert block_of(config, 128).flops == more - less


def test_what_gqa_keeps():
    """Norms' inputs and results 4 x 32. Queries 32, keys and values 16 each, result 32. Experts:
    2 rows of 32, and gate, up and activation of 2 + 1 experts of 16."""
    levels = block_of(GQA, 128).levels
    attention = 32 + 16 + 16 + 32
    assert levels["none"].kept == 2 * (4 * 32 + attention + 2 * 32 + 3 * 3 * 16)
    # Norms' results and activation are computed again, and the experts' numbers have a byte.
    assert levels["selective"].kept == 2 * (2 * 32 + attention) + 2 * 32 + 2 * 3 * 16
    assert levels["full"].kept == 2 * 32
    # Gradients of q, k, v, of attention's last product, of gate and up, and of 3 experts' results.
    gradients = 64 + 32 + 2 * 3 * 16 + 3 * 32
    assert levels["none"].pending == levels["selective"].pending == 2 * gradients
    # Inputs: both norms' results, attention's result, the rows, and the activation.
    assert levels["full"].pending == 2 * (gradients + 2 * 32 + 32 + 2 * 32 + 3 * 16)


def test_what_mla_computes_again():
    """Queries of 4 x (8 + 4) from 12 numbers, keys and values of 4 x (8 + 6) from 10."""
    levels = block_of(MLA, 128).levels
    assert levels["selective"].again == 2 * (12 * 48 + 10 * 56)
    assert levels["none"].again == 0
    assert levels["full"].again == block_of(MLA, 128).forward
    # Queries and keys of 48, values of 24 are kept at `none` alone.
    kept = 2 * (2 * 32 + 12 + 10 + 4 + 24) + 2 * 32 + 2 * 3 * 16
    assert levels["selective"].kept == kept


def test_queries_without_a_compression_are_kept():
    plain = replace(MLA, attention=replace(MLA.attention, q_rank=0))
    more = block_of(plain, 128).levels["selective"]
    less = block_of(MLA, 128).levels["selective"]
    assert more.kept - less.kept == 2 * (48 - 12)
    assert more.again == 2 * 10 * 56
