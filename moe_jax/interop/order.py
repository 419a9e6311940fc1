"""Rows and columns that published files keep in another order than we do.

rotary: rotary embedding turns pairs of rows of a head. Here a pair is row i of the first half and
row i of the second (moe_jax.model.rope). Interleaved files have the two rows side by side.
halves: the projection of multi-token prediction reads the hidden state and the embedding side by
side, here in this order, in files in the other.
"""

from typing import NamedTuple

import numpy as np

from moe_jax.config import AttentionConfig
from moe_jax.interop.names import Order


class Rotary(NamedTuple):
    """The rows of a projection that are rotated: the last `rotated` ones of each of its heads."""

    heads: int
    rotated: int


def rotary_rows(parameter: str, c: AttentionConfig) -> Rotary:
    """The rotated rows of a projection to queries or keys, by the end of its dotted path."""
    projection = parameter.split(".")[-2]
    by_name = {
        "query": Rotary(c.heads, c.head_dim),
        "key": Rotary(c.kv_heads, c.head_dim),
        "query_up": Rotary(c.heads, c.rope_dim),
        "kv_down": Rotary(1, c.rope_dim),
    }
    return by_name[projection]


def ours(array: np.ndarray, order: Order, rotary: Rotary | None) -> np.ndarray:
    """A file's [outputs, inputs] in our order. `rotary`: None where pairs are not interleaved."""
    if order == "halves":
        return np.roll(array, array.shape[-1] // 2, axis=-1)
    if order == "rotary" and rotary is not None:
        # Rows 0, 1, 2, 3, … of the file are our rows 0, half, 1, half + 1, …
        return _turned(array, rotary, (-1, 2))
    return array


def theirs(array: np.ndarray, order: Order, rotary: Rotary | None) -> np.ndarray:
    """The inverse of `ours`."""
    if order == "rotary" and rotary is not None:
        return _turned(array, rotary, (2, -1))
    return ours(array, order, rotary)


def _turned(array: np.ndarray, rotary: Rotary, split: tuple[int, int]) -> np.ndarray:
    heads = array.reshape(rotary.heads, -1, array.shape[-1])
    kept, turned = np.split(heads, [heads.shape[1] - rotary.rotated], axis=1)
    pairs = turned.reshape(rotary.heads, *split, array.shape[-1])
    turned = pairs.swapaxes(1, 2).reshape(turned.shape)
    return np.concatenate([kept, turned], axis=1).reshape(array.shape)
