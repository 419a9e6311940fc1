"""Settings of a mixture-of-experts layer."""

from dataclasses import dataclass
from typing import Literal

from moe_jax.base.errors import require
from moe_jax.config.checks import fraction, known_choices, not_negative, positive


@dataclass(frozen=True)
class MoEConfig:
    """A mixture-of-experts feed-forward layer (DeepSeekMoE, with the gate and the balance of
    DeepSeek-V3)."""

    experts: int = 8
    """Routed experts (E)."""
    experts_per_token: int = 2
    """Experts that a token goes to (K)."""
    expert_hidden: int = 128
    """Hidden width of one expert (F)."""
    shared_experts: int = 1
    """Experts that every token goes to.
    Together they are one SwiGLU of this many times expert_hidden."""
    gate: Literal["softmax", "sigmoid"] = "sigmoid"
    """How router logits become scores.
    `sigmoid` is DeepSeek-V3's, with a router bias that acts on the selection only."""
    rule: Literal["top_k", "noisy_top_k", "expert_choice", "token_rounding", "hash"] = "top_k"
    """How scores become choices (moe/rules.py).
    `noisy_top_k` adds learned noise to the router logits in training.
    `expert_choice`: experts choose tokens, so a token's route depends on later tokens.
    `token_rounding` rounds each expert's load to a multiple of rounding_tile in training.
    `hash` is a baseline without learning: a fixed hash of the token id chooses.
    Its router is not trained, and balance losses change nothing."""
    allow_acausal: bool = False
    """Let rule=expert_choice train an autoregressive model.
    The model then sees which later tokens compete for its experts.
    Its validation loss is therefore too low."""
    rounding_tile: int = 64
    """token_rounding: an expert's load becomes a multiple of this many rows."""
    capacity_factor: float = 0.0
    """Expert capacity: an expert computes at most ceil(factor · T K / E) tokens.
    T counts one micro-batch's tokens on all devices, padding included. Later tokens beyond the
    capacity are dropped.
    0 is dropless. With expert_choice, an expert takes exactly its capacity, and 0 means 1."""
    normalise: bool = True
    """Divide the weights of the K selected experts by their sum.
    Training refuses it with K = 1: every weight is 1 then, and the router has no gradient."""
    scale: float = 1.0
    """Factor on the routed experts' weights, after normalisation."""
    groups: int = 1
    """Group-limited selection: the experts are split into this many groups (G)."""
    groups_per_token: int = 1
    """Groups that a token may use: those with the best group_score."""
    group_score: Literal["auto", "max", "top2", "node"] = "auto"
    """How a group is scored for a token.
    `max` is the group's best score (DeepSeek-V2).
    `top2` is the sum of its best 2 scores (DeepSeek-V3's code).
    `node` is the sum of its best experts_per_token / groups_per_token (DeepSeek-V3's report).
    `auto` takes top2 with the sigmoid gate and max with softmax."""
    bias_rate: float = 0.001
    """Auxiliary-loss-free balance: change of the router bias after each update.
    0 turns it off. It needs the sigmoid gate."""
    bias_until: float = 1.0
    """Fraction of the steps after which the router bias is frozen."""
    sequence_loss: float = 1e-4
    """Weight of the balance loss within each sequence (DeepSeek-V3). 0 turns it off.
    Tokens of padding count in none of these losses."""
    expert_loss: float = 0.0
    """Weight of the balance loss over experts (DeepSeekMoE). 0 turns it off.
    Loads are those of one micro-batch on all devices, so optim.accumulation changes the loss."""
    device_loss: float = 0.0
    """Weight of the balance loss over groups of experts (DeepSeekMoE). 0 turns it off.
    Loads are taken as for expert_loss."""
    locality_loss: float = 0.0
    """Weight of the locality loss, which keeps neighbouring tokens with the same experts.
    Decoding with experts in tiers then copies fewer of them. 0 turns it off."""
    z_loss: float = 0.0
    """Weight of the router z-loss, mean(logsumexp(logits)^2). 0 turns it off."""
    implementation: Literal["auto", "reference", "xla", "triton", "triton_async"] = "auto"
    """Implementation of the routed experts (moe/layer.py).
    `auto` takes the fastest that can run here.
    `triton` needs an NVIDIA GPU of compute capability 8.0 or more.
    `triton_async` has TMA and specialised warps, on 9.0 and 10.0. `auto` never takes it."""
    precision: Literal["compute", "fp8"] = "compute"
    """Operands of the routed experts' forward products.
    `compute` has them in compute_dtype.
    `fp8` has them in E4M3, in tiles of 1x128 and 128x128 (DeepSeek-V3 §3.3).
    Gradients stay in compute_dtype.
    triton is fast with fp8 on compute capability 8.9 or more. xla emulates it anywhere."""
    fp8_scales: Literal["float32", "power_of_two"] = "float32"
    """fp8: scale of a tile, exact or rounded up to a power of two."""

    def __post_init__(self) -> None:
        owner = "model.moe"
        known_choices(owner, self)
        positive(owner, self, "experts", "experts_per_token", "expert_hidden", "groups")
        positive(owner, self, "groups_per_token", "scale", "rounding_tile")
        not_negative(owner, self, "shared_experts", "bias_rate", "capacity_factor")
        not_negative(owner, self, "sequence_loss", "expert_loss", "device_loss", "z_loss")
        not_negative(owner, self, "locality_loss")
        fraction(owner, self, "bias_until")
        self._check_groups(owner)
        require(
            self.capacity_factor <= self.experts,
            f"{owner}.capacity_factor={self.capacity_factor} exceeds experts={self.experts}: an "
            "expert can get every token already, set it to 0 for dropless",
        )
        require(
            self.gate == "sigmoid" or self.bias_rate == 0,
            f"{owner}.bias_rate={self.bias_rate} needs gate=sigmoid: softmax routing has no "
            "selection bias (set bias_rate to 0)",
        )
        self._check_rule(owner)
        self._check_precision(owner)

    def _check_groups(self, owner: str) -> None:
        require(
            self.experts_per_token <= self.experts,
            f"{owner}.experts_per_token={self.experts_per_token} exceeds experts={self.experts}: "
            "a token goes to distinct experts",
        )
        require(
            self.experts % self.groups == 0,
            f"{owner}.groups={self.groups} does not divide experts={self.experts}",
        )
        require(
            self.groups_per_token <= self.groups,
            f"{owner}.groups_per_token={self.groups_per_token} exceeds groups={self.groups}",
        )
        reachable = self.experts // self.groups * self.groups_per_token
        require(
            self.experts_per_token <= reachable,
            f"{owner}.experts_per_token={self.experts_per_token} exceeds the {reachable} experts "
            f"in groups_per_token={self.groups_per_token} of groups={self.groups}",
        )
        require(
            self.device_loss == 0 or self.groups > 1,
            f"{owner}.device_loss={self.device_loss} needs groups of experts: with groups=1 it is "
            "constant",
        )

    def _check_rule(self, owner: str) -> None:
        rule = f"{owner}.rule={self.rule}"
        require(
            self.rule != "expert_choice" or self.allow_acausal,
            f"{rule} is not causal: a token's route depends on later tokens, so the model sees the "
            "future (set allow_acausal to train with it anyway)",
        )
        require(
            self.rule not in ("expert_choice", "hash") or self.bias_rate == 0,
            f"{rule} uses no selection bias: set bias_rate={self.bias_rate} to 0",
        )
        require(
            self.rule not in ("expert_choice", "hash") or self.groups_per_token == self.groups,
            f"{rule} knows no groups: set groups_per_token={self.groups_per_token} to "
            f"groups={self.groups}",
        )

    def _check_precision(self, owner: str) -> None:
        require(
            self.precision != "fp8" or self.implementation in ("auto", "xla", "triton"),
            f"{owner}.precision=fp8 needs implementation auto, xla or triton: "
            f"{self.implementation} computes in compute_dtype alone",
        )
        require(
            self.precision == "fp8" or self.fp8_scales == "float32",
            f"{owner}.fp8_scales={self.fp8_scales} needs precision=fp8",
        )

    @property
    def slots(self) -> int:
        """Most experts that one token can get: K, or up to 4 K under a rule by which experts
        choose tokens too."""
        experts_choose = self.rule in ("expert_choice", "token_rounding")
        # Arrays need a fixed width. More than 4 times the mean number of experts is rare, and a
        # token that more experts took keeps the best of them (moe/rules.py).
        most = 4 * self.experts_per_token if experts_choose else self.experts_per_token
        return min(self.experts, most)
