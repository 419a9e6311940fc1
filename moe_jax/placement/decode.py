"""Decoding with experts in tiers: attention and gate of a layer, fetch, experts, next layer.

The routed experts' matrices are not part of the model here; an ExpertStore brings those that a
token needs. Sums over experts are taken in ascending order of their numbers, one matrix product an
expert, so the result is the same bit for bit whatever is resident. (Experts that an accelerator's
host computes are summed apart: there the last bits may differ.)
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
    weights: Float[Array, "B K"]
    chosen: Int[Array, "2 B K"]
    """This block's experts, and the next block's as its gate would choose them now."""


def mix(
    normed: Float[Array, "B D"],
    experts: Int[Array, "B K"],
    weights: Float[Array, "B K"],
    ids: Int[Array | np.ndarray, "A"],
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
        self.shares = store.low_bit is not None
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
        shapes = store.files.gate_up_shape, store.files.down_shape
        zeros = tuple(jnp.zeros(shape, store.files.dtype) for shape in shapes)
        self._nothing: Expert = jax.device_put(zeros, store.device)  # pyright: ignore

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
        ids, at = jnp.asarray(tokens, jnp.int32), jnp.int32(position)
        last = len(self._blocks) - 1
        begun = self._blocks[0], self._blocks[min(1, last)]
        entered, dense, cache = self._programs.begin(self._trunk, *begun, ids, at, dense, sparse[0])
        extended = [cache]
        for layer in range(last):
            own, following = self._blocks[layer + 1], self._blocks[min(layer + 2, last)]
            entered, cache = self._programs.turn(
                self._blocks[layer], own, following, self._leaving(layer, entered), ids, at,
                sparse[layer + 1],
            )  # fmt: skip
            self.store.settle()
            extended.append(cache)
        logits = self._programs.end(self._trunk, self._blocks[last], self._leaving(last, entered))
        self.store.settle()
        return logits, (dense, extended)

    def _leaving(self, layer: int, entered: Entered) -> "Leaving":
        """The experts that a block needs, from the store."""
        chosen, ahead = np.asarray(entered.chosen)
        if self.routing is not None:
            self.routing.append(chosen)
        experts = self.config.moe.experts
        rows = np.bincount(chosen.ravel(), minlength=experts)[:experts]
        active = np.flatnonzero(rows)
        following = None
        if self.look_ahead and layer < len(self._blocks) - 1:
            following = _by_rank(ahead, experts)
        share = _shares(chosen, np.asarray(entered.weights), active) if self.shares else None
        matrices = self.store.fetch(layer, active, following, rows=rows[active], share=share)
        width, elsewhere = min(chosen.size, experts), None
        here = [index for index, (gate_up, _) in enumerate(matrices) if self._is_here(gate_up)]
        if len(here) < len(active):
            there = [index for index in range(len(active)) if index not in here]
            elsewhere = self._computed_there(
                entered, active[there], [matrices[index] for index in there], width
            )
        own = [matrices[index] for index in here]
        return Leaving(entered, *_padded(active[here], own, width, self._nothing), elsewhere)

    def _is_here(self, array: Array) -> bool:
        return self.store.unified or array.device == self.store.device

    def _computed_there(
        self, entered: Entered, ids: np.ndarray, matrices: list[Expert], width: int
    ) -> Array:
        """The share of experts that stay in host memory, computed by the CPU."""
        cpu = matrices[0][0].sharding
        inputs = jax.device_put((entered.normed, entered.weights, entered.chosen[0]), cpu)
        nothing = jax.device_put(self._nothing, cpu)
        normed, weights, chosen = inputs
        out = _mix(normed, chosen, weights, *_padded(ids, matrices, width, nothing))
        return jax.device_put(out, self.store.device)


class Leaving(NamedTuple):
    """A block with its experts."""

    entered: Entered
    ids: Int[np.ndarray, "A"]
    """Distinct, ascending, then -1."""
    matrices: list[Expert]
    elsewhere: Float[Array, "B D"] | None
    """What experts that are not here add."""


def _padded(
    ids: np.ndarray, matrices: list[Expert], width: int, nothing: Expert
) -> tuple[np.ndarray, list[Expert]]:
    """Filled up with -1 to `width`, so that a few programs serve all numbers of experts."""
    missing = width - len(ids)
    filler = matrices[0] if matrices else nothing
    padded = np.concatenate([ids, np.full(missing, -1)]).astype(np.int32)
    return padded, [*matrices, *[filler] * missing]


def _shares(
    chosen: Int[np.ndarray, "B K"], weights: Float[np.ndarray, "B K"], active: np.ndarray
) -> Float[np.ndarray, "A"]:
    """The largest share of a token's weight that each active expert has."""
    share = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-20)
    return np.array([share[chosen == expert].max() for expert in active])


def _by_rank(ahead: Int[np.ndarray, "B K"], experts: int) -> list[int]:
    """Distinct predicted experts, every token's first choice before the second ones."""
    ordered = dict.fromkeys(ahead.T.ravel().tolist())
    return [expert for expert in ordered if expert < experts]


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
    """(trunk, block, next block, tokens [B], position, dense caches, cache) -> (Entered, dense
    caches, cache): all up to the first sparse block's experts"""
    turn: Any
    """(block, own, next block, Leaving, tokens, position, cache) -> (Entered, cache): from one
    block's experts to those of its successor `own`"""
    end: Any
    """(trunk, block, Leaving) -> logits [B, V]"""


@lru_cache(maxsize=8)
def _programs(config: ModelConfig) -> Programs:
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    del model.sparse
    if config.mtp_depth:
        del model.mtp
    trunk = _part(model)
    block = _part(nnx.eval_shape(lambda: Block(config, sparse=True, rngs=nnx.Rngs(0))))

    def begin(
        leaves: Any, own: Any, following: Any, tokens: Array, at: Array, dense: Any, cache: Cache
    ) -> tuple[Entered, Any, Cache]:
        model = trunk.merge(leaves)
        x = model.embed(tokens[:, None])
        if config.dense_layers:
            sight = cached_sight(config, at, 1, dense[0].shape[2])
            x, (dense, _) = model.dense(x, sight, dense, Context(tokens[:, None]))
        entered, cache = enter(own, following, x[:, 0], tokens, at, cache)
        return entered, dense, cache

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
        both = jnp.stack([chosen.experts, ahead.experts])
        return Entered(x, normed, chosen.weights, both), cache

    def leave(leaves: Any, leaving: Leaving) -> Array:
        own, (x, normed, weights, chosen) = block.merge(leaves), leaving.entered
        x = x + mix(normed, chosen[0], weights, leaving.ids, leaving.matrices)
        if leaving.elsewhere is not None:
            x = x + leaving.elsewhere
        return x + own.feed_forward(normed) if own.dense else x

    def turn(
        leaves: Any, own: Any, following: Any, leaving: Leaving, tokens: Array, at: Array,
        cache: Cache,
    ) -> tuple[Entered, Cache]:  # fmt: skip
        return enter(own, following, leave(leaves, leaving), tokens, at, cache)

    def end(leaves: Any, own: Any, leaving: Leaving) -> Array:
        return trunk.merge(leaves).logits(leave(own, leaving)[:, None])[:, 0]

    return Programs(
        trunk,
        block,
        jax.jit(begin, donate_argnums=(5, 6)),
        jax.jit(turn, donate_argnums=6),
        jax.jit(end),
    )


_mix = jax.jit(mix)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _sample(key: Array, logits: Array, vocabulary: int, temperature: float, top_k: int) -> Array:
    return sample(key, logits[:, :vocabulary], temperature, top_k)


def save_experts(folder: Path, parameters: nnx.State, *, low_bit: bool = False) -> int:
    """Writes the routed experts of a model's sparse blocks for ExpertFiles, a file a layer."""
    moe: Any = parameters["sparse"]["blocks"]["moe"]  # pyright: ignore[reportIndexIssue]
    gate_up, down = moe["gate_up"][...], moe["down"][...]

    def layers() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for layer in range(len(gate_up)):
            yield np.asarray(gate_up[layer]), np.asarray(down[layer])

    return write_experts(folder, layers(), low_bit=low_bit)
