"""The compiled programs of decoding with experts in tiers, and what passes between them.

They compose model/stages.py. A leave and the enter after it are one program, because at one token a
call costs more than its computation.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from moe_jax.config import ModelConfig
from moe_jax.model import stages
from moe_jax.model.abstract import abstract_block, abstract_model
from moe_jax.model.attention import Cache
from moe_jax.model.generate import sample
from moe_jax.model.stages import Context, Entered
from moe_jax.moe.experts import expert_output


class Chosen(NamedTuple):
    """A block before its experts, and its router's decision."""

    entered: Entered
    """[B, 1, D] each."""
    weights: Float[Array, "B K"]
    experts: Int[Array, "2 B K"]
    """This block's experts, and the next block's as its router would choose them now. Both come in
    one array, so that the host reads the device once a layer."""


class Leaving(NamedTuple):
    """A block with its experts' outputs."""

    chosen: Chosen
    ids: Int[np.ndarray, "active"]
    """The active experts: distinct, ascending, then padded with -1. A = min(B·K, E), so that one
    program serves any number of active experts."""
    outputs: list[Float[Array, "B D"]]
    """The output of each active expert for every row, in float32 and not weighted. Any finite
    values where the id is -1."""


def weighted_sum(leaving: Leaving) -> Float[Array, "B D"]:
    """sum over the active experts, in the order of their ids: weight · output, in float32."""
    entered, weights, experts = leaving.chosen
    out = jnp.zeros((len(weights), entered.x.shape[-1]), jnp.float32)
    for index, y in enumerate(leaving.outputs):
        # 0 for a row that did not choose this expert, and for padding: no expert has number -1.
        weight = jnp.sum(jnp.where(experts[0] == leaving.ids[index], weights, 0.0), axis=1)
        out += weight[:, None] * y
    return out.astype(entered.normed.dtype)


class Part(NamedTuple):
    """A part of the model: its static graph and the structure of its state."""

    graph: nnx.GraphDef
    structure: Any
    """jax.tree_util.PyTreeDef of the state."""
    state: Any
    """Shapes and dtypes."""

    def merge(self, leaves: tuple[Array, ...]) -> Any:
        """The part as an object that can be called."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.structure, leaves))

    def leaves(self, arrays: Any) -> tuple[Array, ...]:
        """The leaves of this part, from a nested dictionary of its arrays."""
        # A copy of the tree, because replace_by_pure_dict works in place.
        state = jax.tree.map(lambda leaf: leaf, self.state)
        nnx.replace_by_pure_dict(state, arrays)
        return tuple(jax.tree.leaves(state))


def _part(module: nnx.Module) -> Part:
    graph, state = nnx.split(module)
    return Part(graph, jax.tree.structure(state), state)


class StepInput(NamedTuple):
    """The tokens that a step reads, and their position in the sequence."""

    tokens: Int[Array, "B"]
    position: Int[Array, ""]


Leaves = tuple[Array, ...]
"""The parameters of the trunk or of one block (Part.leaves). A plain tuple, because an nnx.State is
flattened in Python at every call, which at one token costs more than the computation."""


class Programs(NamedTuple):
    """The jitted programs, shared by all decoders of one config. KV caches are donated."""

    trunk: Part
    """The model without its sparse blocks and without multi-token prediction."""
    block: Part
    """One sparse block."""
    begin: Any
    """(trunk, block, next block, StepInput, dense caches, cache) -> (Chosen, dense caches, cache):
    everything before the experts of the first sparse block"""
    turn: Any
    """(block, (own, next block), Leaving, StepInput, cache) -> (Chosen, cache): from the experts of
    `block` to those of its successor `own`"""
    end: Any
    """(trunk, block, Leaving) -> logits [B, V]"""


@lru_cache(maxsize=8)
def programs_of(config: ModelConfig) -> Programs:
    """The programs of a config. They are compiled at their first call."""
    model = abstract_model(config)
    del model.sparse
    if config.mtp_depth:
        del model.mtp
    trunk = _part(model)
    block = _part(abstract_block(config))

    def context(at: StepInput, cache: Cache) -> Context:
        slots = cache[0].shape[1]  # [B, slots, …]
        return stages.next_tokens(config, at.tokens[:, None], at.position, slots)

    def begin(
        leaves: Leaves, own: Leaves, following: Leaves, at: StepInput, dense: Any, cache: Cache
    ) -> tuple[Chosen, Any, Cache]:
        x, dense = trunk.merge(leaves).begin(context(at, cache), dense)
        chosen, cache = enter((own, following), x, at, cache)
        return chosen, dense, cache

    def enter(
        pair: tuple[Leaves, Leaves], x: Array, at: StepInput, cache: Cache
    ) -> tuple[Chosen, Cache]:
        own, following = (block.merge(leaves) for leaves in pair)
        here = context(at, cache)
        entered, cache = stages.enter(own, x, here, cache)
        routing = stages.choose(own, entered.normed, here).routing
        # The next block's router reads this block's stream: a guess, good enough to prefetch by.
        ahead = stages.choose(following, following.feed_forward_norm(entered.x), here).routing
        experts = jnp.stack([routing.experts, ahead.experts])
        return Chosen(entered, routing.weights, experts), cache

    def leave(leaves: Leaves, leaving: Leaving) -> Array:
        entered = leaving.chosen.entered
        routed = weighted_sum(leaving)[:, None]  # [B, 1, D]
        return stages.leave(block.merge(leaves), entered, routed)

    def turn(
        leaves: Leaves,
        pair: tuple[Leaves, Leaves],
        leaving: Leaving,
        at: StepInput,
        cache: Cache,
    ) -> tuple[Chosen, Cache]:
        return enter(pair, leave(leaves, leaving), at, cache)

    def end(leaves: Leaves, own: Leaves, leaving: Leaving) -> Array:
        return stages.end(trunk.merge(leaves), leave(own, leaving))[:, 0]

    return Programs(
        trunk=trunk,
        block=block,
        begin=jax.jit(begin, donate_argnums=(4, 5)),
        turn=jax.jit(turn, donate_argnums=4),
        end=jax.jit(end),
    )


one_expert = jax.jit(expert_output)
"""(rows [B, D], gate_up, down) -> the output of one expert for all rows, float32[B, D]. The same
program for every expert, resident or not, so that their bits do not depend on where they were."""


@partial(jax.jit, static_argnums=(2, 3, 4))
def sample_below(
    key: Array, logits: Float[Array, "B V"], vocabulary: int, temperature: float, top_k: int
) -> Int[Array, "B"]:
    """generate.sample among the ids below `vocabulary`."""
    return sample(key, logits[:, :vocabulary], temperature, top_k)
