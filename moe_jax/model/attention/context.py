"""What attention knows about the tokens: which keys a query may see, and rotary angles."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int

from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.model.rope import Rotation, rotation


class AttentionMask(NamedTuple):
    """Query l may see key m if m <= start + l and both belong to the same segment (document).

    The mask is kept as its parts, O(L + keys) integers, because B x L x keys booleans would be as
    long as the scores that the blockwise implementation avoids.
    """

    start: Int[Array, ""] | None
    """Slot of the first query among the keys. None: the queries are the keys' own tokens, so the
    mask is known to be causal when the program is compiled."""
    query_segments: Int[Array, "#B L"]
    key_segments: Int[Array, "#B keys"]

    @property
    def positions(self) -> Int[Array, "L"]:
        """Slot of each query among the keys."""
        return self.offset + jnp.arange(self.query_segments.shape[1])

    @property
    def offset(self) -> Int[Array, ""]:
        """`start` as a number."""
        return jnp.zeros((), jnp.int32) if self.start is None else self.start

    def same_document(self) -> Bool[Array, "#B L keys"]:
        """Whether query l and key m belong to one segment."""
        return self.query_segments[:, :, None] == self.key_segments[:, None, :]

    def dense(self) -> Bool[Array, "#B L keys"]:
        """Whether query l may see key m."""
        keys = jnp.arange(self.key_segments.shape[1])
        return self.same_document() & (keys <= self.positions[:, None])


class AttentionContext(NamedTuple):
    """The part of attention's input that is the same for every block."""

    rotation: Rotation
    """Rotary angles of the queries."""
    mask: AttentionMask


def rotary_width(c: AttentionConfig) -> int:
    """Width of the part of a head that is rotated."""
    return c.head_dim if c.kind == "gqa" else c.rope_dim


def document_context(model: ModelConfig, segments: Int[Array, "B L"]) -> AttentionContext:
    """Each token sees itself and the earlier tokens of its own document (segment number).

    Positions count through the whole window: rotary attention depends on distances only.
    """
    positions = jnp.arange(segments.shape[1])[None]
    return AttentionContext(_rotation(model, positions), AttentionMask(None, segments, segments))


def cached_context(
    model: ModelConfig,
    start: Int[Array, ""],
    length: int,
    slots: int,
    segments: Int[Array, "B slots"] | None = None,
) -> AttentionContext:
    """`length` new tokens from position `start` on see every earlier slot of a KV cache.

    With `segments`, they see the slots of their own document alone.
    """
    if segments is None:
        segments = jnp.ones((1, slots), jnp.int32)
    own = lax.dynamic_slice_in_dim(segments, start, length, axis=1)
    mask = AttentionMask(start, own, segments)
    return AttentionContext(_rotation(model, mask.positions[None]), mask)


def _rotation(model: ModelConfig, positions: Int[Array, "B L"]) -> Rotation:
    return rotation(positions, rotary_width(model.attention), model.rope_base, model.yarn)
