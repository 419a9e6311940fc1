"""Settings of attention."""

import math
from dataclasses import dataclass
from typing import Literal

from moe_jax.base.errors import require
from moe_jax.config.checks import known_choices, not_negative, positive


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention (`gqa`) or multi-head latent attention (`mla`, DeepSeek-V2 §2.1)."""

    kind: Literal["gqa", "mla"] = "gqa"
    """Kind of attention. A help text below that begins with a kind is for that kind alone."""
    heads: int = 4
    """Query heads (H)."""
    kv_heads: int = 2
    """gqa: key/value heads. Each serves heads / kv_heads query heads."""
    head_dim: int = 64
    """gqa: width of one head."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """gqa: RMSNorm of queries and keys.
    `head` normalises each head by itself (Qwen3), `full` all heads together (OLMoE)."""
    q_rank: int = 0
    """mla: rank of the query compression. 0 projects queries directly (DeepSeek-V2-Lite)."""
    kv_rank: int = 64
    """mla: rank of the key/value compression. The KV cache stores the compressed form."""
    nope_dim: int = 32
    """mla: width of a head's part without rotary position."""
    rope_dim: int = 32
    """mla: width of the rotary part. All heads share its key."""
    v_dim: int = 32
    """mla: width of a head's value."""
    implementation: Literal["auto", "reference", "blockwise", "cudnn"] = "auto"
    """How attention is computed (model/attention/api.py). reference keeps all B·H·L² scores.
    blockwise keeps one block of scores at a time. cudnn needs an NVIDIA GPU of compute capability
    8.0 or more and compute_dtype bfloat16 or float16. auto takes the best that can run."""

    def __post_init__(self) -> None:
        owner = "model.attention"
        known_choices(owner, self)
        positive(owner, self, "heads")
        if self.kind == "gqa":
            positive(owner, self, "kv_heads", "head_dim")
            require(
                self.heads % self.kv_heads == 0,
                f"{owner}.heads={self.heads} is not divisible by kv_heads={self.kv_heads}: "
                "each key/value head serves the same number of query heads",
            )
        else:
            positive(owner, self, "kv_rank", "nope_dim", "rope_dim", "v_dim")
            not_negative(owner, self, "q_rank")
        name = "head_dim" if self.kind == "gqa" else "rope_dim"
        rotary = getattr(self, name)
        require(
            rotary % 2 == 0,
            f"{owner}.{name}={rotary} is odd: rotary embedding rotates pairs, so it must be even",
        )


@dataclass(frozen=True)
class YarnConfig:
    """Rotary frequencies for contexts longer than the training's (YaRN, arXiv:2309.00071)."""

    factor: float = 1.0
    """Length of the longer context as a multiple of original_length. 1 changes nothing."""
    original_length: int = 4096
    """Length of the context that the unscaled frequencies were trained with."""
    beta_fast: float = 32.0
    """Frequencies that turn at least this often within original_length are kept."""
    beta_slow: float = 1.0
    """Frequencies that turn at most this often within original_length are divided by factor.
    Between the two counts, the two are mixed linearly."""
    mscale: float = 1.0
    """cos and sin are multiplied by m(mscale) / m(mscale_all_dim), m(s) = 0.1 · s · ln(factor) + 1.
    DeepSeek-V2 and V3 have mscale equal to mscale_all_dim, so that the quotient is 1."""
    mscale_all_dim: float = 0.0
    """mla: the softmax's scale is multiplied by m(mscale_all_dim)².
    It is 0.707 in DeepSeek-V2-Lite and 1 in DeepSeek-V3."""

    def __post_init__(self) -> None:
        owner = "model.yarn"
        positive(owner, self, "factor", "original_length", "beta_fast", "beta_slow")
        not_negative(owner, self, "mscale", "mscale_all_dim")
        require(
            self.factor >= 1,
            f"{owner}.factor={self.factor} is below 1: it is how much longer the context becomes",
        )
        require(
            self.beta_fast > self.beta_slow,
            f"{owner}.beta_fast={self.beta_fast} must exceed beta_slow={self.beta_slow}",
        )

    @property
    def rotary_factor(self) -> float:
        """Factor on cos and sin."""
        return self._m(self.mscale) / self._m(self.mscale_all_dim)

    @property
    def softmax_factor(self) -> float:
        """Factor on the softmax's scale."""
        return self._m(self.mscale_all_dim) ** 2

    def _m(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0
