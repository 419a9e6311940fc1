"""What one sparse block of a model computes and keeps, counted from its configuration."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.config.attention import AttentionConfig
from moe_jax.config.moe import MoEConfig
from moe_jax.model.abstract import abstract_block, split_model
from moe_jax.model.parameters import role_of

Recompute = Literal["none", "selective", "full"]
"""What is computed again before Bi. `none`: attention's scores alone (arXiv:2205.14135), and what
the experts return. `selective`: as DeepSeek-V3 (arXiv:2412.19437, sections 3.2.3 and 3.3), norms,
the products that widen MLA's compressed queries, keys and values, and SwiGLU, with the rows of the
experts and SwiGLU's input kept in FP8. `full`: all of the block."""


class Level(NamedTuple):
    """A level of recomputation, for one token."""

    kept: float
    """Bytes from F to W."""
    pending: float
    """Bytes from Bi to W: gradients of products' outputs, and their inputs if they were recomputed
    in full. All in bfloat16."""
    again: float
    """FLOPs that are computed again."""


@dataclass(frozen=True)
class Block:
    """Counts of a block. FLOPs are those of one token."""

    width: int
    """D"""
    experts: int
    """E"""
    per_token: int
    """K"""
    expert_weights: int
    """Parameters of all routed experts."""
    other_weights: int
    """Parameters that every token uses."""
    scores: float
    """FLOPs of attention's two products without parameters, forward."""
    levels: dict[Recompute, Level]

    @property
    def weights(self) -> int:
        """All parameters."""
        return self.expert_weights + self.other_weights

    @property
    def active(self) -> float:
        """Parameters that one token uses."""
        return self.other_weights + self.expert_weights * self.per_token / self.experts

    @property
    def forward(self) -> float:
        """FLOPs of F."""
        return 2 * self.active + self.scores

    @property
    def backward_input(self) -> float:
        """FLOPs of Bi. Each product without parameters has two gradients, and both are in Bi."""
        return 2 * self.active + 2 * self.scores

    @property
    def backward_weight(self) -> float:
        """FLOPs of W."""
        return 2 * self.active

    @property
    def flops(self) -> float:
        """Model FLOPs, as in moe_jax.model.count.train_flops_per_token."""
        return self.forward + self.backward_input + self.backward_weight


def block_of(config: ModelConfig, length: int) -> Block:
    """The counts of a sparse block for rows of `length` tokens."""
    parameters = split_model(abstract_block(config))[1]
    sizes = {"expert": 0, "other": 0}
    for path, leaf in nnx.to_flat_state(parameters):
        sizes["expert" if role_of(path) == "expert" else "other"] += leaf.size
    block = Block(
        width=config.width,
        experts=config.moe.experts,
        per_token=config.moe.experts_per_token,
        expert_weights=sizes["expert"],
        other_weights=sizes["other"],
        scores=_score_flops(config.attention, length),
        levels={},
    )
    block.levels.update(_levels(config, block.forward))
    return block


def _score_flops(attention: AttentionConfig, length: int) -> float:
    """2 L H (A + C) / 2: queries with keys and weights with values, without the masked half."""
    if attention.kind == "gqa":
        widths = 2 * attention.head_dim
    else:
        widths = attention.nope_dim + attention.rope_dim + attention.v_dim
    return float(length * attention.heads * widths)


def _levels(config: ModelConfig, forward: float) -> dict[Recompute, Level]:
    D = config.width
    attention = _attention_numbers(config.attention)
    experts = _expert_numbers(config.moe, D)
    # 4 D: the inputs of both norms, and what the norms give.
    whole = 4 * D + attention.wide + attention.compressed + attention.out
    whole += experts.rows + experts.gate_up + experts.activation
    inputs = 2 * D + attention.compressed + attention.out + experts.rows + experts.activation
    gradients = attention.outputs + D + experts.gate_up + experts.down
    low = 2 * (2 * D + attention.compressed + attention.out + attention.kept_wide)
    low += experts.rows + experts.gate_up
    return {
        "none": Level(2 * whole, 2 * gradients, 0.0),
        "selective": Level(low, 2 * gradients, attention.again),
        "full": Level(2 * D, 2 * (gradients + inputs), forward),
    }


class _Attention(NamedTuple):
    """Numbers of a token."""

    wide: int
    """Queries, keys and values, as attention reads them."""
    kept_wide: int
    """Those of them that are not recomputed selectively."""
    compressed: int
    out: int
    """The heads' results."""
    outputs: int
    """Of all products with parameters but the last one."""
    again: float
    """FLOPs of the products that make `wide` from `compressed`."""


def _attention_numbers(attention: AttentionConfig) -> _Attention:
    a = attention
    if a.kind == "gqa":
        queries = a.heads * a.head_dim
        wide = queries + 2 * a.kv_heads * a.head_dim
        return _Attention(wide, wide, 0, queries, wide, 0.0)
    queries = a.heads * (a.nope_dim + a.rope_dim)
    values = a.heads * a.v_dim
    widened = a.heads * a.nope_dim + values
    compressed = a.q_rank + a.kv_rank + a.rope_dim
    again = 2.0 * (a.q_rank * queries + a.kv_rank * widened)
    # Without a compression queries come from the block's input, and are kept.
    kept_wide = 0 if a.q_rank else queries
    outputs = queries + widened + compressed
    return _Attention(2 * queries + values, kept_wide, compressed, values, outputs, again)


class _Experts(NamedTuple):
    """Numbers of a token, of routed and shared experts together."""

    rows: int
    """What routed experts receive. The shared expert reads the norm's result."""
    gate_up: int
    activation: int
    down: int


def _expert_numbers(moe: MoEConfig, D: int) -> _Experts:
    hidden = moe.expert_hidden * (moe.experts_per_token + moe.shared_experts)
    down = D * (moe.experts_per_token + (1 if moe.shared_experts else 0))
    return _Experts(D * moe.experts_per_token, 2 * hidden, hidden, down)
