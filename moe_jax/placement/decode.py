"""Decoding with experts in tiers: attention and gate of a layer, fetch, experts, next layer.

The routed experts' matrices are not part of the model here. An ExpertStore brings the experts that
a token needs. Each is computed as soon as it has arrived, so experts in memory compute while others
are read. One program computes any expert, and their outputs are summed in ascending order of their
numbers. So the result is the same bit for bit, whatever is resident and in whatever order experts
arrive. (On an accelerator, experts that the host computes are rounded as the CPU rounds.)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from moe_jax.config import ModelConfig, require
from moe_jax.model.attention import Cache, empty_cache
from moe_jax.model.dtype import compute_dtype
from moe_jax.model.generate import require_cache_room
from moe_jax.model.trunk import EXPERT
from moe_jax.placement.decode_programs import (
    Chosen,
    Leaving,
    StepInput,
    one_expert,
    programs_of,
    sample_below,
)
from moe_jax.placement.store import Expert, ExpertStore, Lease

Caches = tuple[Any, list[Cache]]
"""KV caches: of the dense blocks together, with a leading layer axis (None if there are none), and
of each sparse block. Sparse blocks run as separate programs, so their caches are not stacked."""


class TieredDecoder:
    """A trained model without its routed experts, beside the store that has them.

    `parameters` and `router` are the model's states (nnx.split by Param and RouterBias). Their
    expert matrices are not kept. With `look_ahead` the next layer's gate predicts its experts from
    this layer's residual stream, and they are prefetched. UserError: a dense model, a routing rule
    that looks at other tokens, or experts of another shape.
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
        self.routing: list[np.ndarray] | None = None
        """Set to [] to collect the chosen experts, [B, K] for each token and layer."""
        self._programs = programs_of(config)
        outside = nnx.to_pure_dict(nnx.merge_state(parameters, router))
        stacked: Any = outside.pop("sparse")["blocks"]
        outside.pop("mtp", None)
        self._trunk = self._programs.trunk.leaves(outside)
        # The experts come from the store. Empty arrays keep their places in the block's tree.
        for name in EXPERT:
            stacked["moe"][name] = jnp.zeros((config.moe_layers, 0))
        self._blocks = [
            self._programs.block.leaves(jax.tree.map(lambda a, i=layer: a[i], stacked))
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
        on_token: Callable[[], None] = lambda: None,
    ) -> Int[np.ndarray, "B count"]:
        """`count` tokens after each prompt, drawn as by model.generate.

        `on_token` is called when the next token of every row is known. UserError: the KV caches
        have no room.

        The prompt is read position by position. All of it at once would need most experts of a
        layer together.
        """
        batch, length = prompt.shape
        require_cache_room(self.config, batch, length + count)
        caches = self.empty_caches(batch, length + count)
        logits = None
        tokens = np.asarray(prompt)
        for position in range(length):
            logits, caches = self.step(tokens[:, position], position, caches)
        generated: list[np.ndarray] = []
        for index in range(count):
            assert logits is not None, "generate needs a prompt of at least one token"
            # The same key for the same token as in model.generate.
            own = jax.random.fold_in(key, index)
            token = sample_below(own, logits, vocabulary, temperature, top_k)
            generated.append(np.asarray(token))
            on_token()
            if index + 1 < count:  # the logits after the last token are not needed
                logits, caches = self.step(generated[-1], length + index, caches)
        return np.stack(generated, axis=1) if generated else np.zeros((batch, 0), np.int32)

    def empty_caches(self, batch: int, slots: int) -> Caches:
        """KV caches with room for `slots` tokens, in the compute dtype."""
        config = self.config

        def one() -> Cache:
            return empty_cache(config.attention, batch, slots, compute_dtype(config))

        dense = [one() for _ in range(config.dense_layers)]
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *dense) if dense else None
        return stacked, [one() for _ in range(config.moe_layers)]

    def step(
        self, tokens: Int[np.ndarray, "B"], position: int, caches: Caches
    ) -> tuple[Float[Array, "B V"], Caches]:
        """Logits after one more token of each row, and the caches extended by it.

        The given caches are donated: they must not be used again.
        """
        dense, sparse = caches
        at = StepInput(jnp.asarray(tokens, jnp.int32), jnp.int32(position))
        blocks = self._blocks
        last = len(blocks) - 1
        chosen, dense, cache = self._programs.begin(
            self._trunk, blocks[0], blocks[min(1, last)], at, dense, sparse[0]
        )
        extended = [cache]
        for layer in range(last):
            # The last block has no next one: its own router's guess is computed and not used.
            pair = (blocks[layer + 1], blocks[min(layer + 2, last)])
            leaving = self._run_experts(layer, chosen)
            chosen, cache = self._programs.turn(blocks[layer], pair, leaving, at, sparse[layer + 1])
            # After the next program is on its way: the store's bookkeeping then overlaps with it.
            self.store.settle()
            extended.append(cache)
        logits = self._programs.end(self._trunk, blocks[last], self._run_experts(last, chosen))
        self.store.settle()
        return logits, (dense, extended)

    def _run_experts(self, layer: int, decided: Chosen) -> Leaving:
        """Fetches the experts of a block from the store and computes them in order of arrival."""
        chosen, ahead = np.asarray(decided.experts)  # [B, K] each; waits for the device
        normed = decided.entered.normed[:, 0]
        if self.routing is not None:
            self.routing.append(chosen)
        experts = self.config.moe.experts
        # Number E stands for no expert: the slice drops its count.
        rows = np.bincount(chosen.ravel(), minlength=experts)[:experts]
        active = np.flatnonzero(rows)
        following = None
        if self.look_ahead and layer < len(self._blocks) - 1:
            following = _by_rank(ahead, experts)
        share = None
        if self.store.low_bit is not None:
            share = _shares(chosen, np.asarray(decided.weights), active)
        outputs: dict[int, Array] = {}

        def compute(index: int, lease: Lease) -> None:
            # The lease is held until the output is computed: its memory may not be reused before.
            outputs[index] = lease.used_by(self._expert_output(normed, lease.matrices))

        self.store.fetch(layer, active, following, rows=rows[active], share=share, arrived=compute)
        padding = min(chosen.size, experts) - len(active)
        filler = outputs[0] if outputs else normed.astype(jnp.float32)
        ids = np.concatenate([active, np.full(padding, -1)]).astype(np.int32)
        present = [outputs[index] for index in range(len(active))]
        return Leaving(decided, ids, present + [filler] * padding)

    def _expert_output(self, normed: Float[Array, "B D"], matrices: Expert) -> Array:
        """The output of one expert, computed where its matrices are and returned on the device."""
        sharding = matrices[0].sharding
        if self.store.unified or sharding.device_set == {self.store.device}:
            return one_expert(normed, *matrices)
        # The activations travel to the host's copy: D numbers a row against 3·D·F of an expert.
        output = one_expert(jax.device_put(normed, sharding), *matrices)
        return jax.device_put(output, self.store.device)


def _shares(
    chosen: Int[np.ndarray, "B K"], weights: Float[np.ndarray, "B K"], active: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "n"]:
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
