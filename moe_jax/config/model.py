"""Settings of the model."""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.base.errors import require
from moe_jax.config.attention import AttentionConfig, YarnConfig
from moe_jax.config.checks import fraction_below_one, known_choices, not_negative, positive
from moe_jax.config.moe import MoEConfig

DType = Literal["float32", "bfloat16", "float16"]
ComputeDType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: `dense_layers` dense blocks, then mixture-of-experts blocks."""

    vocabulary: int | None = None
    """Rows of the embedding (V). None: as many as the tokenizer has ids."""
    width: int = 256
    """Width of the residual stream (D)."""
    layers: int = 4
    """Transformer blocks, dense ones included."""
    dense_layers: int = 1
    """Number of blocks, the first ones, with a dense feed-forward layer instead of experts.
    If it equals `layers`, the model is dense."""
    dense_hidden: int = 512
    """Hidden width of the dense feed-forward layers."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mtp_depth: int = 0
    """Multi-token prediction: further tokens that are predicted (DeepSeek-V3 §2.2).
    Each has a module of its own."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss, averaged over the depths."""
    mtp_input: Literal["residual", "normed"] = "residual"
    """Hidden state that a module of multi-token prediction reads.
    `residual` is the residual stream (DeepSeek-V3 eq. 21).
    `normed` is its norm, which the head reads too, as the released weights need it."""
    tied_embedding: bool = True
    """The output head is the transposed embedding."""
    norm_epsilon: float = 1e-6
    """RMSNorm: added to the mean square before its root is taken."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    yarn: YarnConfig = field(default_factory=YarnConfig)
    init_std: float = 0.02
    """Standard deviation of the normal initialisation."""
    dropout: float = 0.0
    """Share of values set to 0 in training, the rest scaled up (arXiv:1706.03762, §5.4).
    It applies to the embedding and to each block's additions to the residual stream."""
    param_dtype: DType = "float32"
    """Type of parameters and optimizer moments."""
    compute_dtype: ComputeDType = "auto"
    """Type of matrix products and activations (model/dtype.py).
    `auto` is bfloat16 where matrix units multiply it (TPU, NVIDIA from compute capability 8.0),
    and float32 anywhere else, as on a CPU or a T4.
    float16 has no loss scale here: small gradients become 0."""
    gradient_dtype: Literal["float32", "compute"] = "float32"
    """Type in which the gradients of matrices are summed, over tokens and over devices.
    `compute` is compute_dtype. With bfloat16 it halves what devices send, and rounds more."""
    output_dtype: DType = "float32"
    """Type of the logits that the model returns. The loss is always computed in float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them in memory.
    `none` is none of them, `dots` all but matrix products, `full` all inside a block."""
    unroll: int = 1
    """Blocks that the scan over blocks runs in one iteration.
    More make a small model faster, and a deep model slow to compile."""

    def __post_init__(self) -> None:
        owner = "model"
        known_choices(owner, self)
        positive(owner, self, "width", "layers", "unroll")
        positive(owner, self, "norm_epsilon", "rope_base", "init_std")
        not_negative(owner, self, "dense_layers", "mtp_depth", "mtp_weight")
        fraction_below_one(owner, self, "dropout")
        require(
            self.mtp_depth <= 16,  # each is a block of its own that is compiled
            f"{owner}.mtp_depth is {self.mtp_depth}: it must be at most 16",
        )
        require(
            self.yarn.factor == 1 or self.rope_base > 1,
            f"{owner}.rope_base={self.rope_base} must exceed 1 where yarn.factor does",
        )
        require(
            self.attention.kind == "mla" or self.yarn.mscale_all_dim == 0,
            f"{owner}.yarn.mscale_all_dim={self.yarn.mscale_all_dim} needs attention.kind=mla",
        )
        require(
            self.vocabulary is None or self.vocabulary > 0,
            f"{owner}.vocabulary is {self.vocabulary}: it must be positive",
        )
        require(
            self.dense_layers <= self.layers,
            f"{owner}.dense_layers={self.dense_layers} exceeds layers={self.layers}",
        )
        require(
            self.dense_layers == 0 or self.dense_hidden > 0,
            f"{owner}.dense_hidden is {self.dense_hidden}: it must be positive when "
            f"dense_layers={self.dense_layers}",
        )

    @property
    def moe_layers(self) -> int:
        """Number of mixture-of-experts blocks in the main model."""
        return self.layers - self.dense_layers
