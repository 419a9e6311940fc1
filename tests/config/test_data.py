"""Impossible settings of the text, refused before anything is read or compiled."""

import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import DataConfig


@pytest.mark.parametrize(
    "tokenizer",
    [
        "bpe:²",
        "bpe:٣٠٠",
        "bpe:",
        "bpe:-300",
        "bpe:3e3",
        "bpe:300\n",
        "bpe:" + "9" * 5000,
    ],
)
def test_sizes_that_are_no_plain_number(tokenizer: str):
    with pytest.raises(UserError, match=r"data\.tokenizer '.* is unknown: use bytes or bpe:N"):
        DataConfig(tokenizer=tokenizer)


@pytest.mark.parametrize("tokens", [1, 0, -5])
def test_held_out_text_of_no_text(tokens: int):
    with pytest.raises(UserError, match=rf"data\.validation_tokens is {tokens}: .* at least 2"):
        DataConfig(validation_tokens=tokens)
    assert DataConfig(validation_tokens=2).validation_tokens == 2


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_a_share_that_leaves_one_side_empty(fraction: float):
    with pytest.raises(UserError, match=r"data\.validation_fraction is"):
        DataConfig(validation_fraction=fraction)


def test_a_folder_without_its_kind_is_told_the_kind():
    with pytest.raises(UserError, match=r"source '~/books' is unknown: .*a folder is files:FOLDER"):
        DataConfig(source="~/books")
