"""The rules that choose experts from selection scores, one function each.

A rule takes (selection scores [T, E], config, context) and returns int32[T, slots]. A row holds a
token's experts, best first and distinct, filled up with E for no expert. No gradient passes through
a choice.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moe_jax.config import MoEConfig


class RoutingContext(NamedTuple):
    """Inputs that routing needs besides the scores."""

    tokens: Int[Array, "..."] | None = None
    """Token ids, for hash routing."""
    key: Array | None = None
    """The random key of a training step. None outside training: no noise and no rounding."""
    documents: Int[Array, "B L"] | None = None
    """The number of each token's document, 0 for none (padding). Tokens of no document go to no
    expert and enter no statistic and no balance loss. None: all tokens are of one document."""
    noise: Float[Array, "B L E"] | None = None
    """Noisy top-k's draws. None: they are drawn from the key. Over many devices they are drawn
    for all rows together, so that they do not depend on the layout."""

    @property
    def counted(self) -> Bool[Array, "T"] | None:
        """Whether a token belongs to a document. None: all do."""
        return None if self.documents is None else self.documents.reshape(-1) != 0

    def draw_noise(
        self, config: MoEConfig, shape: tuple[int, ...]
    ) -> Float[Array, "*shape"] | None:
        """The draws for tokens of this shape. None where the rule has no noise."""
        if self.key is None or config.rule != "noisy_top_k":
            return None
        return jax.random.normal(self.key, (*shape, config.experts))


NO_CONTEXT = RoutingContext()

Rule = Callable[[Float[Array, "T E"], MoEConfig, RoutingContext], Int[Array, "T slots"]]


def top_k(
    selection: Float[Array, "T E"], config: MoEConfig, context: RoutingContext
) -> Int[Array, "T K"]:
    """The K best experts of the allowed groups. Ties go to the lower index."""
    allowed = limit_groups(selection, config)
    return lax.top_k(allowed, config.experts_per_token)[1]


def expert_choice(
    selection: Float[Array, "T E"], config: MoEConfig, context: RoutingContext
) -> Int[Array, "T slots"]:
    """Every expert takes its c = ceil(factor · T K / E) best tokens (arXiv:2202.09368, §3.2).

    Not causal: whether a token is taken depends on the tokens after it.
    """
    capacity = expert_capacity(len(selection), config, config.capacity_factor or 1.0)
    # An argsort of an argsort is the rank of each token in each expert's column.
    order = jnp.argsort(-selection, axis=0, stable=True)
    return _fill_slots(jnp.argsort(order, axis=0) < capacity, selection, config)


def token_rounding(
    selection: Float[Array, "T E"], config: MoEConfig, context: RoutingContext
) -> Int[Array, "T slots"]:
    """top_k, and then each expert's load n is rounded to a multiple of the tile.

    The expert loses its lowest tokens, or gains the best of the tokens that had not chosen it
    (arXiv:2512.14080, §5). The rounded load is tile · floor(n / tile + 1/2). Outside training it is
    top_k alone, because rounding looks at other tokens, as expert choice does.
    """
    chosen = top_k(selection, config, context)
    if context.key is None:
        return chosen
    picked = jnp.any(chosen[:, :, None] == jnp.arange(selection.shape[1]), axis=1)  # [T, E]
    if context.counted is not None:
        picked &= context.counted[:, None]
    tile = config.rounding_tile
    rounded = (2 * picked.sum(axis=0) + tile) // (2 * tile) * tile
    # Ranks per expert: tokens that chose it first, then the others, each by score. A token whose
    # groups exclude the expert is never added, even where the rounded load has room.
    allowed = limit_groups(selection, config)
    order = jnp.lexsort((-allowed, ~picked), axis=0)
    taken = (jnp.argsort(order, axis=0) < rounded) & (allowed != -jnp.inf)
    return _fill_slots(taken, selection, config)


def hash_tokens(
    selection: Float[Array, "T E"], config: MoEConfig, context: RoutingContext
) -> Int[Array, "T K"]:
    """K experts by a fixed hash of the token's id: a baseline without learning (arXiv:2106.04426).

    Every (id, expert) pair is hashed, and the K experts with the largest hashes are taken. So they
    are distinct.
    """
    assert context.tokens is not None, "hash routing needs token ids: pass RoutingContext(tokens)"
    # The two factors are odd, so that different ids (and different experts) stay different.
    experts = jnp.arange(selection.shape[1], dtype=jnp.uint32)
    word = context.tokens.reshape(-1, 1).astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    word = word ^ ((experts + 1) * jnp.uint32(0x85EBCA77))
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):  # MurmurHash3's finaliser
        word = (word ^ (word >> 15)) * jnp.uint32(multiplier)
    return lax.top_k(word ^ (word >> 16), config.experts_per_token)[1]


def balanced(
    selection: Float[Array, "T E"], config: MoEConfig, context: RoutingContext
) -> Int[Array, "T K"]:
    """Expert (t + floor(k E / K)) mod E is the k-th of token t: perfect balance, for benchmarks.

    A token's experts are spread over all devices. t counts one device's tokens.
    """
    number = config.experts_per_token
    steps = jnp.arange(number) * config.experts // number
    return (jnp.arange(len(selection))[:, None] + steps) % config.experts


RULES: dict[str, Rule] = {
    "top_k": top_k,
    "noisy_top_k": top_k,
    "expert_choice": expert_choice,
    "token_rounding": token_rounding,
    "hash": hash_tokens,
    "balanced": balanced,
}
"""By `model.moe.rule`. Noisy top-k differs in its logits alone (route.add_noise)."""
EXPERTS_CHOOSE = ("expert_choice", "token_rounding")
"""Rules by which an expert compares many tokens."""


def expert_capacity(tokens: int, config: MoEConfig, factor: float) -> int:
    """ceil(factor · T K / E), at least 1 and at most T."""
    # -int(-x // 1) is ceil(x). `tokens` is a static shape, so the capacity is one, too.
    share = factor * tokens * config.experts_per_token / config.experts
    return min(tokens, max(1, -int(-share // 1)))


def limit_groups(selection: Float[Array, "T E"], config: MoEConfig) -> Float[Array, "T E"]:
    """Sets the scores of all but a token's best groups to -inf (arXiv:2412.19437, §2.1.2).

    A group is E / groups neighbouring experts, as they lie on one device. Its score is the sum of
    its best `representatives` scores.
    """
    if config.groups_per_token == config.groups:
        return selection
    tokens, experts = selection.shape
    size = experts // config.groups
    grouped = selection.reshape(tokens, config.groups, size)
    best, _ = lax.top_k(grouped, min(representatives(config), size))
    _, winners = lax.top_k(best.sum(axis=-1), config.groups_per_token)
    keep = jnp.any(winners[:, :, None] == jnp.arange(config.groups), axis=1)
    return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(tokens, experts)


def representatives(config: MoEConfig) -> int:
    """The number of best scores that are summed to the score of a group.

    1 for `max` (DeepSeek-V2), 2 for `top2` (DeepSeek-V3's code), and K / groups_per_token, rounded
    up, for `node` (node-limited routing in DeepSeek-V3's report). `auto` follows the gate.
    """
    if config.group_score == "node":
        return -(-config.experts_per_token // config.groups_per_token)
    if config.group_score == "auto":
        return 2 if config.gate == "sigmoid" else 1
    return {"max": 1, "top2": 2}[config.group_score]


def _fill_slots(
    taken: Bool[Array, "T E"], selection: Float[Array, "T E"], config: MoEConfig
) -> Int[Array, "T slots"]:
    """The taken experts of each token, best first: at most `config.slots`, filled up with E."""
    masked = jnp.where(taken, selection, -jnp.inf)
    _, experts = lax.top_k(masked, config.slots)
    # top_k also returns experts that were not taken, where a token has fewer than the slots.
    is_taken = jnp.take_along_axis(taken, experts, axis=1)
    return jnp.where(is_taken, experts, config.experts)
