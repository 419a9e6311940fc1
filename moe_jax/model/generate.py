"""Sampling continuations, with a KV cache or by recomputing everything for each token."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int

from moe_jax.base.errors import require
from moe_jax.base.machine import available_bytes
from moe_jax.config import ModelConfig
from moe_jax.model.attention import empty_cache
from moe_jax.model.dtype import compute_dtype
from moe_jax.model.transformer import Transformer


def sample(
    key: Array, logits: Float[Array, "B V"], temperature: float, top_k: int
) -> Int[Array, "B"]:
    """Draws from softmax(logits / temperature) over the `top_k` most likely tokens (0: over all).

    A temperature of 0 takes the most likely token.
    """
    logits = logits.astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1)
    if top_k:
        # Logits equal to the k-th largest stay, so that more than k tokens may be left by a tie.
        weakest = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < weakest, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature)


@partial(jax.jit, static_argnames=("graph", "count", "vocabulary", "temperature", "top_k"))
def generate(  # noqa: PLR0913 - the settings of sampling, by name
    graph: nnx.GraphDef,
    parameters: Any,
    prompt: Int[Array, "B L"],
    key: Array,
    *,
    count: int,
    vocabulary: int,
    temperature: float = 0.8,
    top_k: int = 0,
    segments: Int[Array, "B L"] | None = None,
) -> Int[Array, "B count"]:
    """`count` tokens after each prompt. All prompts have the same length.

    `segments` numbers the documents of a packed prompt. The last of them is continued, and the
    others are not seen. None: the prompt is one document.

    `parameters` is every state that nnx.merge(graph, *parameters) takes. The prompt is read once
    into the KV caches. Then each token costs one position. Ids from `vocabulary` on are not drawn:
    they are rows of the table that the tokenizer never uses.
    """
    model: Transformer = nnx.merge(graph, *parameters)
    batch, length = prompt.shape
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (0, count)), mode="edge")

    # `start` is a Python int for the prompt, and traced in the scan.
    def advance(tokens: Array, start: Any, caches: Any) -> tuple[Array, Any]:
        hidden, caches = model.extend(tokens, jnp.asarray(start), caches, segments)
        return model.logits(hidden[:, -1:])[:, 0, :vocabulary], caches

    logits, caches = advance(prompt, 0, model.empty_caches(batch, length + count))

    def step(carry: tuple[Array, Any], index: Array) -> tuple[tuple[Array, Any], Array]:
        logits, caches = carry
        token = sample(jax.random.fold_in(key, index), logits, temperature, top_k)
        return advance(token[:, None], length + index, caches), token

    _, tokens = lax.scan(step, (logits, caches), jnp.arange(count))
    return tokens.T  # the scan stacks [count, B]


def require_cache_room(config: ModelConfig, batch: int, slots: int) -> None:
    """UserError: KV caches for `batch` rows of `slots` tokens are larger than what is free.

    Call it before `generate`, with the tokens of the prompt and those to write.
    """
    dtype = compute_dtype(config)
    one = jax.eval_shape(lambda: empty_cache(config.attention, batch, 1, dtype))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in one) * config.layers * slots
    available = available_bytes()
    fits = available is None or needed <= available
    require(
        fits and slots < 2**31,  # positions are 32-bit integers
        f"{batch} x {slots} tokens need {needed / 1e9:,.1f} GB for keys and values, and "
        f"{(available or 0) / 1e9:,.1f} GB are free: write fewer tokens",
    )


def generate_uncached(
    model: Transformer,
    prompt: Int[Array, "B L"],
    key: Array,
    *,
    count: int,
    vocabulary: int,
    temperature: float = 0.8,
    top_k: int = 0,
) -> Int[Array, "B count"]:
    """The specification of `generate`: each token comes from a full pass over all tokens before it.

    It draws the same tokens, up to rounding. Tests compare the two.
    """
    tokens = prompt
    for index in range(count):
        logits = model(tokens, jnp.ones_like(tokens))[:, -1, :vocabulary]
        token = sample(jax.random.fold_in(key, index), logits, temperature, top_k)
        tokens = jnp.concatenate([tokens, token[:, None].astype(tokens.dtype)], axis=1)
    return tokens[:, prompt.shape[1] :]
