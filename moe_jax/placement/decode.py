"""Decoding with experts in tiers: attention and gate of a layer, fetch, experts, next layer.

The routed experts' matrices are not part of the model here; an ExpertStore brings those that a
token needs. Sums over experts are taken in ascending order of their numbers, one matrix product an
expert, so the result is the same bit for bit whatever is resident.
"""

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from moe_jax.config import ModelConfig, require
from moe_jax.model.attention import Cache, cached_sight, empty_cache
from moe_jax.model.block import Block
from moe_jax.model.generate import sample
from moe_jax.model.transformer import Transformer
from moe_jax.moe.experts import swiglu
from moe_jax.moe.layer import project
from moe_jax.moe.route import route
from moe_jax.moe.rules import Context
from moe_jax.placement.files import write_experts
from moe_jax.placement.store import Expert, ExpertStore


class Entered(NamedTuple):
    """A block before its experts."""

    x: Float[Array, "B D"]
    """The residual stream after attention."""
    normed: Float[Array, "B D"]
    """What the experts read."""
    experts: Int[Array, "B K"]
    weights: Float[Array, "B K"]
    ahead: Int[Array, "B K"]
    """The next block's experts as its gate would choose them now."""


def mix(
    normed: Float[Array, "B D"],
    experts: Int[Array, "B K"],
    weights: Float[Array, "B K"],
    ids: Int[Array, "A"],
    matrices: list[Expert],
) -> Float[Array, "B D"]:
    """sum over the A active experts, in the order of `ids`: weight · swiglu(x gate_up) down.

    An id that no token chose (padding) adds zero. Summed in float32.
    """
    out = jnp.zeros(normed.shape, jnp.float32)
    for index, (gate_up, down) in enumerate(matrices):
        weight = jnp.sum(jnp.where(experts == ids[index], weights, 0.0), axis=1)
        y = swiglu(normed @ gate_up.astype(normed.dtype)) @ down.astype(normed.dtype)
        out += weight[:, None] * y.astype(jnp.float32)
    return out.astype(normed.dtype)


class TieredDecoder:
    """A trained model without its routed experts, beside the store that has them.

    `parameters` and `router` are the model's states (nnx.split by Param and RouterBias); their
    expert matrices are not kept. `look_ahead` predicts each layer's experts with its own gate from
    the layer before. UserError: a model whose routing looks at other tokens, or without experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: nnx.State,
        router: nnx.State,
        store: ExpertStore,
        *,
        look_ahead: bool = True,
    ) -> None:
        _check(config, store)
        self.config, self.store, self.look_ahead = config, store, look_ahead
        self.routing: list[np.ndarray] | None = None
        """Set to [] to collect the chosen experts, [B, K] for each token and layer."""
        self._programs = _programs(config)
        everything = nnx.to_pure_dict(nnx.merge_state(parameters, router))
        pure: Any = everything.pop("sparse")["blocks"]
        everything.pop("mtp", None)
        # Plain tuples: an nnx.State is flattened in Python, anew at every call.
        self._trunk = _filled(self._programs.trunk, everything)
        for name in ("gate_up", "down"):
            pure["moe"][name] = jnp.zeros((config.moe_layers, 0))
        self._blocks = [
            _filled(self._programs.block, jax.tree.map(lambda a, i=layer: a[i], pure))
            for layer in range(config.moe_layers)
        ]

    def generate(
        self,
        prompt: Int[Array, "B L"],
        key: Array,
        *,
        count: int,
        vocabulary: int,
        temperature: float = 0.8,
        top_k: int = 0,
    ) -> Int[np.ndarray, "B count"]:
        """As model.generate: `count` tokens after each prompt. The prompt is read position by
        position, since all of it at once would need most experts of a layer together."""
        batch, length = prompt.shape
        caches, logits = self.empty_caches(batch, length + count), None
        tokens = np.asarray(prompt)
        for position in range(length):
            logits, caches = self.step(tokens[:, position], position, caches)
        made = []
        for index in range(count):
            assert logits is not None
            own = jax.random.fold_in(key, index)
            token = _sample(own, logits, vocabulary, temperature, top_k)
            made.append(np.asarray(token))
            if index + 1 < count:
                logits, caches = self.step(made[-1], length + index, caches)
        return np.stack(made, axis=1) if made else np.zeros((batch, 0), np.int32)

    def empty_caches(self, batch: int, slots: int) -> tuple[Any, list[Cache]]:
        """Attention memory: of the dense blocks together, and of each sparse block."""
        c = self.config

        def one() -> Cache:
            return empty_cache(c.attention, batch, slots, jnp.dtype(c.compute_dtype))

        dense = [one() for _ in range(c.dense_layers)]
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *dense) if dense else None
        return stacked, [one() for _ in range(c.moe_layers)]

    def step(
        self, tokens: Int[np.ndarray, "B"], position: int, caches: tuple[Any, list[Cache]]
    ) -> tuple[Float[Array, "B V"], tuple[Any, list[Cache]]]:
        """Logits after one more token each, and the caches extended by it (the old ones are used
        up)."""
        dense, sparse = caches
        ids = jnp.asarray(tokens, jnp.int32)
        at, extended = jnp.int32(position), []
        x, dense = self._programs.begin(self._trunk, ids, at, dense)
        for layer, block in enumerate(self._blocks):
            following = self._blocks[min(layer + 1, len(self._blocks) - 1)]
            entered, cache = self._programs.enter(block, following, x, ids, at, sparse[layer])
            extended.append(cache)
            x = self._experts(layer, block, entered)
        return self._programs.end(self._trunk, x), (dense, extended)

    def _experts(self, layer: int, block: Any, entered: Entered) -> Array:
        """The block's second half, with its experts from the store."""
        chosen = np.asarray(entered.experts)
        if self.routing is not None:
            self.routing.append(chosen)
        active = np.unique(chosen)
        active = active[active < self.config.moe.experts]
        following = None
        if self.look_ahead and layer + 1 < len(self._blocks):
            following = _by_rank(np.asarray(entered.ahead), self.config.moe.experts)
        matrices = self.store.fetch(layer, active, following)
        width = min(chosen.size, self.config.moe.experts)
        padding = width - len(active)
        ids = np.concatenate([active, np.full(padding, -1)]).astype(np.int32)
        matrices += matrices[:1] * padding
        return self._programs.leave(block, entered, ids, matrices)


def _by_rank(ahead: Int[np.ndarray, "B K"], experts: int) -> Int[np.ndarray, "m"]:
    """Distinct predicted experts, every token's first choice before the second ones."""
    flat = ahead.T.ravel()
    _, first = np.unique(flat, return_index=True)
    ordered = flat[np.sort(first)]
    return ordered[ordered < experts]


def _check(config: ModelConfig, store: ExpertStore) -> None:
    moe, files = config.moe, store.files
    require(config.moe_layers > 0, "a dense model (dense_layers equals layers) has no experts")
    require(
        moe.rule != "expert_choice" and moe.capacity_factor == 0,
        f"model.moe.rule={moe.rule} with capacity_factor={moe.capacity_factor} routes a token by "
        "the tokens beside it: decoding with tiers needs a dropless rule by token",
    )
    shape = (config.moe_layers, moe.experts, config.width, 2 * moe.expert_hidden)
    found = (files.layers, files.experts, *files.gate_up_shape)
    require(
        found == shape,
        f"{files.folder} holds experts of (layers, E, D, 2F) = {found}, the model has {shape}",
    )


class Part(NamedTuple):
    """A part of the model: its static graph and the structure of its state."""

    graph: Any
    structure: Any
    state: Any
    """Abstract."""

    def merge(self, leaves: tuple[Array, ...]) -> Any:
        """The part as an object that can be called."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, leaves))


def _part(module: nnx.Module) -> Part:
    graph, state = nnx.split(module)
    return Part(graph, jax.tree.structure(state), state)


def _filled(part: Part, pure: Any) -> tuple[Array, ...]:
    """The leaves of a part, from a nested dictionary of its arrays."""
    state = jax.tree.map(lambda leaf: leaf, part.state)
    nnx.replace_by_pure_dict(state, pure)
    return tuple(jax.tree.leaves(state))


class Programs(NamedTuple):
    """The compiled steps, shared by all decoders of one config."""

    trunk: Part
    block: Part
    begin: Any
    """(trunk, tokens [B], position, dense caches) -> (x [B, D] after the dense blocks, caches)"""
    enter: Any
    """(block, next block, x, tokens, position, cache) -> (Entered, cache)"""
    leave: Any
    """(block, Entered, ids [A], matrices) -> x"""
    end: Any
    """(trunk, x) -> logits [B, V]"""


@lru_cache(maxsize=8)
def _programs(config: ModelConfig) -> Programs:
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    del model.sparse
    if config.mtp_depth:
        del model.mtp
    trunk = _part(model)
    block = _part(nnx.eval_shape(lambda: Block(config, sparse=True, rngs=nnx.Rngs(0))))

    def begin(leaves: Any, tokens: Array, at: Array, dense: Any) -> tuple[Array, Any]:
        model = trunk.merge(leaves)
        x = model.embed(tokens[:, None])
        if config.dense_layers:
            sight = cached_sight(config, at, 1, dense[0].shape[2])
            x, (dense, _) = model.dense(x, sight, dense, Context(tokens[:, None]))
        return x[:, 0], dense

    def enter(
        leaves: Any, following: Any, x: Array, tokens: Array, at: Array, cache: Cache
    ) -> tuple[Entered, Cache]:
        own, after, context = block.merge(leaves), block.merge(following), Context(tokens)
        sight = cached_sight(config, at, 1, cache[0].shape[1])
        attended, cache = own.attention(own.attention_norm(x[:, None]), sight, cache)
        x = x + attended[:, 0]
        normed = own.feed_forward_norm(x)

        def gate(moe: Any, normed: Array) -> Any:
            logits = project(normed, moe.router[...])
            return route(logits, moe.bias[...], config.moe, context)

        chosen, ahead = gate(own.moe, normed), gate(after.moe, after.feed_forward_norm(x))
        return Entered(x, normed, chosen.experts, chosen.weights, ahead.experts), cache

    def leave(leaves: Any, entered: Entered, ids: Array, matrices: list[Expert]) -> Array:
        own = block.merge(leaves)
        x = entered.x + mix(entered.normed, entered.experts, entered.weights, ids, matrices)
        return x + own.feed_forward(entered.normed) if own.dense else x

    def end(leaves: Any, x: Array) -> Array:
        return trunk.merge(leaves).logits(x[:, None])[:, 0]

    return Programs(
        trunk,
        block,
        jax.jit(begin, donate_argnums=3),
        jax.jit(enter, donate_argnums=5),
        jax.jit(leave),
        jax.jit(end),
    )


@partial(jax.jit, static_argnums=(2, 3, 4))
def _sample(key: Array, logits: Array, vocabulary: int, temperature: float, top_k: int) -> Array:
    return sample(key, logits[:, :vocabulary], temperature, top_k)


def save_experts(folder: Path, parameters: nnx.State) -> int:
    """Writes the routed experts of a model's sparse blocks for ExpertFiles, a file a layer."""
    moe: Any = parameters["sparse"]["blocks"]["moe"]  # pyright: ignore[reportIndexIssue]
    gate_up, down = moe["gate_up"][...], moe["down"][...]

    def layers() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for layer in range(len(gate_up)):
            yield np.asarray(gate_up[layer]), np.asarray(down[layer])

    return write_experts(folder, layers())
