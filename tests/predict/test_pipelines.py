"""Published pipelines by formula: a block by hand, and the order of layouts."""

from dataclasses import replace

import pytest

from moe_jax.predict.collectives import RING_BASE
from moe_jax.predict.hardware import find_card
from moe_jax.predict.layouts.block_work import PRODUCT_SHARE
from moe_jax.predict.layouts.fsdp import fsdp
from moe_jax.predict.pipelines import LAUNCHES, TERMS, row_seconds
from moe_jax.predict.published_pipelines import PIPELINES

VALUES = {name: term.value for name, term in TERMS.items()}
NOTHING = VALUES | {"passes": 0, "launch": 0.0, "host": 0.0, "sending": 0}
ROWS = {row.name: row for row in PIPELINES}
GOOD = ROWS["qwen3_235b_pp8_ep32"]
CARD = find_card("h100")


def test_a_block_without_terms_is_its_products_and_transfers():
    """Two devices share a sequence: a gather and a scatter of 2048 rows of 4096 numbers."""
    work = GOOD.block(NOTHING)
    products = 2048 * work.block.forward / (PRODUCT_SHARE * CARD.product_rate)
    transfer = RING_BASE + CARD.link.hop + 2048 * 4096 * 2 / CARD.link.rate
    assert work.forward.compute == pytest.approx(products + 2 * transfer)
    alone = replace(GOOD, tensor=1).block(NOTHING)
    assert alone.forward.compute == pytest.approx(2 * products)


def test_each_term_is_added_to_a_block():
    without = GOOD.block(NOTHING).forward.compute
    # 75 kernels, and two for each of the 4 experts of a device
    launched = GOOD.block(NOTHING | {"launch": 1.0}).forward.compute
    assert launched - without == pytest.approx(LAUNCHES["forward"] + 8)
    hosted = GOOD.block(NOTHING | {"host": 1.0}).forward.compute
    assert hosted == LAUNCHES["forward"] + 8
    moved = GOOD.block(NOTHING | {"passes": 5}).forward.compute - without
    kept = 2048 * GOOD.block(NOTHING).block.levels["none"].kept
    assert moved == pytest.approx(2 * kept / CARD.memory_rate)


def test_fp8_and_sending_change_the_products_alone():
    plain = replace(GOOD, tensor=1).block(NOTHING).forward.compute
    fp8 = replace(GOOD, tensor=1, fp8=True).block(NOTHING).forward
    quick = replace(GOOD, tensor=1).block(NOTHING | {"sending": 66}).forward
    assert fp8.experts < plain
    assert quick.compute == pytest.approx(2 * plain)  # half of the 132 multiprocessors


def test_the_device_with_the_head_is_the_slowest():
    """Of three blocks of a device, one gives way to a head that takes longer than it."""
    deep = replace(GOOD, pipe=32, pieces=3, expert=8, sequences=4 * 32)
    small = replace(deep, model=f"{deep.model} --model.vocabulary 1024 --data.tokenizer bpe:1024")
    assert row_seconds(deep, VALUES) > 1.1 * row_seconds(small, VALUES)


def test_overlap_is_what_a_compiled_program_lacks_in_the_published_fsdp_layout():
    """Two rows of 4096 tokens a device in each of 4 passes took 17.6 s (qwen3_235b_256_h100)."""
    work = replace(replace(GOOD, expert=8, recompute="full").block(VALUES), tokens=2 * 4096)
    assert fsdp(work, 94, 4, 256).seconds == pytest.approx(17.6, rel=0.1)
    assert fsdp(work, 94, 4, 256, overlap=False).seconds > 1.8 * 17.6
