"""Decoding with experts in tiers: attention and gate of a layer, fetch, experts, next layer.

The routed experts' matrices are not part of the model here. An ExpertStore brings those that a
token needs. Each is computed as soon as it is there, so residents work while absent ones are read.
One program computes any expert, and their outputs are summed in ascending order of their numbers,
so the result is the same bit for bit whatever is resident and whoever came first. (What an
accelerator's host computes is rounded as the CPU rounds.)
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
from moe_jax.model import stages
from moe_jax.model.abstract import abstract_block, abstract_model
from moe_jax.model.attention import Cache, empty_cache
from moe_jax.model.generate import sample
from moe_jax.model.stages import Context, Entered
from moe_jax.moe.experts import expert_output
from moe_jax.placement.files import write_experts
from moe_jax.placement.store import Expert, ExpertStore, Lease


class Chosen(NamedTuple):
    """A block before its experts, and its router's decision."""

    entered: Entered
    """[B, 1, D] each."""
    weights: Float[Array, "B K"]
    experts: Int[Array, "2 B K"]
    """This block's experts, and the next block's as its router would choose them now."""


class Leaving(NamedTuple):
    """A block with its experts' outputs."""

    chosen: Chosen
    ids: Int[np.ndarray, "active"]
    """The active experts: distinct, ascending, then -1, so that one program serves any number."""
    outputs: list[Float[Array, "B D"]]
    """Of each in float32, not weighted. Anything finite where the id is -1."""


def mix(leaving: Leaving) -> Float[Array, "B D"]:
    """sum over the active experts, in the order of their ids: weight · output, in float32."""
    entered, weights, experts = leaving.chosen
    out = jnp.zeros((len(weights), entered.x.shape[-1]), jnp.float32)
    for index, y in enumerate(leaving.outputs):
        weight = jnp.sum(jnp.where(experts[0] == leaving.ids[index], weights, 0.0), axis=1)
        out += weight[:, None] * y
    return out.astype(entered.normed.dtype)


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
        self.config = config
        self.store = store
        self.look_ahead = look_ahead
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
        caches = self.empty_caches(batch, length + count)
        logits = None
        tokens = np.asarray(prompt)
        for position in range(length):
            logits, caches = self.step(tokens[:, position], position, caches)
        generated: list[np.ndarray] = []
        for index in range(count):
            assert logits is not None
            own = jax.random.fold_in(key, index)
            token = _sample(own, logits, vocabulary, temperature, top_k)
            generated.append(np.asarray(token))
            if index + 1 < count:
                logits, caches = self.step(generated[-1], length + index, caches)
        return np.stack(generated, axis=1) if generated else np.zeros((batch, 0), np.int32)

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
        at = At(jnp.asarray(tokens, jnp.int32), jnp.int32(position))
        blocks = self._blocks
        last = len(blocks) - 1
        chosen, dense, cache = self._programs.begin(
            self._trunk, blocks[0], blocks[min(1, last)], at, dense, sparse[0]
        )
        extended = [cache]
        for layer in range(last):
            # The last block has no next one: its own router's guess is computed and not used.
            pair = (blocks[layer + 1], blocks[min(layer + 2, last)])
            leaving = self._leaving(layer, chosen)
            chosen, cache = self._programs.turn(blocks[layer], pair, leaving, at, sparse[layer + 1])
            self.store.settle()
            extended.append(cache)
        logits = self._programs.end(self._trunk, blocks[last], self._leaving(last, chosen))
        self.store.settle()
        return logits, (dense, extended)

    def _leaving(self, layer: int, decided: Chosen) -> Leaving:
        """A block with the outputs of its experts, which the store brings."""
        chosen, ahead = np.asarray(decided.experts)
        normed = decided.entered.normed[:, 0]
        if self.routing is not None:
            self.routing.append(chosen)
        experts = self.config.moe.experts
        rows = np.bincount(chosen.ravel(), minlength=experts)[:experts]
        active = np.flatnonzero(rows)
        following = None
        if self.look_ahead and layer < len(self._blocks) - 1:
            following = _by_rank(ahead, experts)
        share = _shares(chosen, np.asarray(decided.weights), active) if self.shares else None
        outputs: dict[int, Array] = {}

        def compute(index: int, lease: Lease) -> None:
            outputs[index] = lease.used_by(self._output(normed, lease.matrices))

        self.store.fetch(layer, active, following, rows=rows[active], share=share, arrived=compute)
        padding = min(chosen.size, experts) - len(active)
        filler = outputs[0] if outputs else normed.astype(jnp.float32)
        ids = np.concatenate([active, np.full(padding, -1)]).astype(np.int32)
        present = [outputs[index] for index in range(len(active))]
        return Leaving(decided, ids, present + [filler] * padding)

    def _output(self, normed: Array, matrices: Expert) -> Array:
        """Of one expert, computed where its matrices are."""
        sharding = matrices[0].sharding
        if self.store.unified or sharding.device_set == {self.store.device}:
            return _expert_output(normed, *matrices)
        output = _expert_output(jax.device_put(normed, sharding), *matrices)
        return jax.device_put(output, self.store.device)


def _shares(
    chosen: Int[np.ndarray, "B K"], weights: Float[np.ndarray, "B K"], active: np.ndarray
) -> Float[np.ndarray, "active"]:
    """The largest share of a token's weight that each active expert has."""
    share = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-20)
    return np.array([share[chosen == expert].max() for expert in active])


def _by_rank(ahead: Int[np.ndarray, "B K"], experts: int) -> list[int]:
    """Distinct predicted experts, every token's first choice before the second ones."""
    ordered = dict.fromkeys(ahead.T.ravel().tolist())
    return [expert for expert in ordered if expert < experts]


def _check(config: ModelConfig, store: ExpertStore) -> None:
    moe = config.moe
    files = store.files
    require(config.moe_layers > 0, "a dense model (dense_layers equals layers) has no experts")
    require(
        moe.rule != "expert_choice" and moe.capacity_factor == 0,
        f"model.moe.rule={moe.rule} with capacity_factor={moe.capacity_factor} routes a token by "
        "the tokens beside it: decoding with tiers needs a dropless rule by token",
    )
    shape = (config.moe_layers, moe.experts, config.width, 2 * moe.expert_hidden)
    stored = (files.layers, files.experts, *files.gate_up_shape)
    require(
        stored == shape,
        f"{files.folder} holds experts of (layers, E, D, 2F) = {stored}, the model has {shape}",
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


class At(NamedTuple):
    """Which tokens a step reads, and where."""

    tokens: Int[Array, "B"]
    position: Int[Array, ""]


class Programs(NamedTuple):
    """The compiled steps, shared by all decoders of one config. They compose model/stages.py: an
    enter and the leave before it are one program, for a call costs more than what it computes."""

    trunk: Part
    block: Part
    begin: Any
    """(trunk, block, next block, At, dense caches, cache) -> (Chosen, dense caches, cache): all up
    to the first sparse block's experts"""
    turn: Any
    """(block, (own, next block), Leaving, At, cache) -> (Chosen, cache): from one block's experts
    to those of its successor `own`"""
    end: Any
    """(trunk, block, Leaving) -> logits [B, V]"""


@lru_cache(maxsize=8)
def _programs(config: ModelConfig) -> Programs:
    model = abstract_model(config)
    del model.sparse
    if config.mtp_depth:
        del model.mtp
    trunk = _part(model)
    block = _part(abstract_block(config))

    def context(at: At, cache: Cache) -> Context:
        return stages.next_tokens(config, at.tokens[:, None], at.position, cache[0].shape[1])

    def begin(
        leaves: Any, own: Any, following: Any, at: At, dense: Any, cache: Cache
    ) -> tuple[Chosen, Any, Cache]:
        x, dense = trunk.merge(leaves).begin(context(at, cache), dense)
        chosen, cache = enter((own, following), x, at, cache)
        return chosen, dense, cache

    def enter(pair: Any, x: Array, at: At, cache: Cache) -> tuple[Chosen, Cache]:
        own, following = (block.merge(leaves) for leaves in pair)
        here = context(at, cache)
        entered, cache = stages.enter(own, x, here, cache)
        routing = stages.choose(own, entered.normed, here).routing
        # The next block's router reads this block's stream: a guess, good enough to prefetch by.
        ahead = stages.choose(following, following.feed_forward_norm(entered.x), here).routing
        experts = jnp.stack([routing.experts, ahead.experts])
        return Chosen(entered, routing.weights, experts), cache

    def leave(leaves: Any, leaving: Leaving) -> Array:
        entered = leaving.chosen.entered
        return stages.leave(block.merge(leaves), entered, mix(leaving)[:, None])

    def turn(
        leaves: Any, pair: Any, leaving: Leaving, at: At, cache: Cache
    ) -> tuple[Chosen, Cache]:
        return enter(pair, leave(leaves, leaving), at, cache)

    def end(leaves: Any, own: Any, leaving: Leaving) -> Array:
        return stages.end(trunk.merge(leaves), leave(own, leaving))[:, 0]

    return Programs(
        trunk,
        block,
        jax.jit(begin, donate_argnums=(4, 5)),
        jax.jit(turn, donate_argnums=4),
        jax.jit(end),
    )


_expert_output = jax.jit(expert_output)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _sample(key: Array, logits: Array, vocabulary: int, temperature: float, top_k: int) -> Array:
    return sample(key, logits[:, :vocabulary], temperature, top_k)


def save_experts(
    folder: Path, parameters: nnx.State, *, dtype: Any = None, low_bit: bool = False
) -> int:
    """Writes the routed experts of a model's sparse blocks for ExpertFiles, a file a layer.

    `dtype`: the type that they are rounded to, on disk and in every memory. Unset: not rounded.
    """
    moe: Any = parameters["sparse"]["blocks"]["moe"]  # pyright: ignore[reportIndexIssue]
    gate_up = moe["gate_up"][...]
    down = moe["down"][...]

    def layers() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for layer in range(len(gate_up)):
            yield (
                np.asarray(gate_up[layer]).astype(dtype or gate_up.dtype),
                np.asarray(down[layer]).astype(dtype or down.dtype),
            )

    return write_experts(folder, layers(), low_bit=low_bit)
