"""The jitted program whose outputs a teacher cache stores: K sampled or top-k tokens a position."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.base.initial import root_key
from moe_jax.base.seeds import check_seed
from moe_jax.config import require
from moe_jax.config.checks import known_choices
from moe_jax.distill.teacher import Teacher, lazy_forward
from moe_jax.model.abstract import graph_of

POSITIONS_AT_ONCE = 64
"""Rows of logits in memory at a time. All rows of a window would be [L, V]."""
LEAST_LOG_P = -60_000.0
"""float16 ends at -65,504, and p log p with log p = -inf would be NaN."""


@dataclass(frozen=True)
class CacheConfig:
    """The part of each distribution that is stored."""

    kind: Literal["sampled", "top_k"] = "sampled"
    count: int = 12
    """Tokens stored for each position (K). The published models needed no more than 12 samples."""
    temperature: float = 1.0
    seed: int = 0
    """Seed of the samples. Those of a window depend on it and on the window only."""
    batch: int = 8
    """Windows in one call of the teacher."""
    shard: int = 1024
    """Windows in one file."""

    def __post_init__(self) -> None:
        known_choices("cache", self)
        for name in ("count", "temperature", "batch", "shard"):
            value = getattr(self, name)
            require(value > 0, f"cache.{name} is {value}: it must be positive")
        check_seed("cache.seed", self.seed)
        require(self.shard % self.batch == 0, f"cache.batch={self.batch} must divide shard")


def make_outputs(
    teacher: Teacher, config: CacheConfig, vocabulary: int
) -> Callable[[Array, Array, Array], dict[str, Array]]:
    """(tokens, segments: [B, L], window numbers: [B]) -> {"tokens": [B, L, K]} and, for top_k,
    {"log_p": [B, L, K + 1]}, whose last entry is the logarithm of all other tokens' mass."""
    fixed = {"graph": graph_of(teacher.model), "config": config, "vocabulary": vocabulary}
    return partial(_outputs, teacher.parameters, teacher.router, **fixed)


@partial(jax.jit, static_argnames=("graph", "config", "vocabulary"))
def _outputs(
    parameters: Any,
    router: Any,
    tokens: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    index: Int[Array, "B"],
    *,
    graph: nnx.GraphDef,
    config: CacheConfig,
    vocabulary: int,
) -> dict[str, Array]:
    of = lazy_forward(nnx.merge(graph, parameters, router), tokens, segments)
    table = of.table[:vocabulary]
    # Each window has keys of its own number, so that its samples do not depend on the batch that
    # it happened to be in: a resumed build continues with the same file contents.
    key = root_key(config.seed)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), tokens.shape[1]))
    choose = {"sampled": _sample, "top_k": _top_k}[config.kind]

    def one(inputs: tuple[Array, Array]) -> dict[str, Array]:
        hidden, key = inputs
        logits = jnp.einsum("d,vd->v", hidden, table, preferred_element_type=jnp.float32)
        return choose(key, jax.nn.log_softmax(logits / config.temperature), count=config.count)

    flat = lax.map(one, (of.hidden, keys(index).reshape(-1)), batch_size=POSITIONS_AT_ONCE)
    return jax.tree.map(lambda leaf: leaf.reshape(*tokens.shape, -1), flat)


def _sample(key: Array, log_p: Float[Array, "V"], *, count: int) -> dict[str, Int[Array, "K"]]:
    """K independent draws by inversion of the cumulative distribution, computed once for all K."""
    cumulative = jnp.cumsum(jnp.exp(log_p))
    # Not 1 but the sum itself, which rounding may leave a little off.
    heights = jax.random.uniform(key, (count,)) * cumulative[-1]
    tokens = jnp.searchsorted(cumulative, heights, side="right")
    return {"tokens": jnp.minimum(tokens, len(log_p) - 1)}


def _top_k(key: Array, log_p: Float[Array, "V"], *, count: int) -> dict[str, Array]:
    best, tokens = lax.top_k(log_p, count)
    tail = jax.nn.logsumexp(log_p.at[tokens].set(-jnp.inf))
    log_p = jnp.concatenate([best, tail[None]])
    return {"tokens": tokens, "log_p": jnp.maximum(log_p, LEAST_LOG_P)}
