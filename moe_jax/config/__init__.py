"""Every setting of a training run, as frozen dataclasses that refuse impossible values.

`python experiments/train.py --help` prints these fields with their help texts; presets.py fills
them in. Each class checks itself when it is made, so a config that exists can be trained.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import tyro

from moe_jax.base.errors import require
from moe_jax.config.distill import DistillConfig

DType = Literal["float32", "bfloat16", "float16"]


def _positive(owner: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{owner}.{name} is {value}: it must be positive")


def _not_negative(owner: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{owner}.{name} is {value}: it must not be negative")


def _fraction(owner: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(0 <= value <= 1, f"{owner}.{name} is {value}: it must lie between 0 and 1")


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)}


def parse_bytes(name: str, text: str) -> int:
    """Bytes of a size such as "2GB", "512MB", "1.5GiB" or "4096" (B may be left out; kB is 1000
    bytes and KiB 1024, whatever the case). UserError: it is none; the line begins with `name`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([kmgt]?i?)b?", text.strip().lower())
    require(
        found is not None and found[2] in UNITS,
        f"{name} '{text}' is no size: write it like 2GB, 512MB, 1.5GiB or as plain bytes",
    )
    assert found is not None
    return int(Fraction(found[1]) * UNITS[found[2]])


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention (`gqa`) or multi-head latent attention (`mla`, DeepSeek-V2 §2.1)."""

    kind: Literal["gqa", "mla"] = "gqa"
    heads: int = 4
    """Query heads (H)."""
    kv_heads: int = 2
    """gqa: key/value heads; each serves heads / kv_heads query heads."""
    head_dim: int = 64
    """gqa: width of one head."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """gqa: RMSNorm of queries and keys, per head (Qwen3) or over all heads at once (OLMoE)."""
    q_rank: int = 0
    """mla: rank of the query compression; 0 projects queries directly (DeepSeek-V2-Lite)."""
    kv_rank: int = 64
    """mla: rank of the key/value compression, which is what the cache holds."""
    nope_dim: int = 32
    """mla: width of a head's part without rotary position."""
    rope_dim: int = 32
    """mla: width of the rotary part; its key is shared by all heads."""
    v_dim: int = 32
    """mla: width of a head's value."""
    implementation: Literal["auto", "reference", "blockwise", "cudnn"] = "auto"
    """How attention is computed (model/attention/api.py). reference keeps all B·H·L² scores.
    blockwise keeps one block of scores at a time. cudnn needs an NVIDIA GPU of compute capability
    8.0 or more and compute_dtype bfloat16 or float16. auto takes the best that can run."""

    def __post_init__(self) -> None:
        owner = "model.attention"
        _positive(owner, self, "heads")
        if self.kind == "gqa":
            _positive(owner, self, "kv_heads", "head_dim")
            require(
                self.heads % self.kv_heads == 0,
                f"{owner}.heads={self.heads} is not divisible by kv_heads={self.kv_heads}: "
                "each key/value head serves the same number of query heads",
            )
        else:
            _positive(owner, self, "kv_rank", "nope_dim", "rope_dim", "v_dim")
            _not_negative(owner, self, "q_rank")
        rotary = self.head_dim if self.kind == "gqa" else self.rope_dim
        name = "head_dim" if self.kind == "gqa" else "rope_dim"
        require(
            rotary % 2 == 0,
            f"{owner}.{name}={rotary} is odd: rotary embedding rotates pairs, so it must be even",
        )


@dataclass(frozen=True)
class MoEConfig:
    """A mixture-of-experts feed-forward layer (DeepSeekMoE; gate and balance of DeepSeek-V3)."""

    experts: int = 8
    """Routed experts (E)."""
    experts_per_token: int = 2
    """Experts a token goes to (K)."""
    expert_hidden: int = 128
    """Hidden width of one expert (F)."""
    shared_experts: int = 1
    """Experts that every token goes to; together one SwiGLU of this many times expert_hidden."""
    gate: Literal["softmax", "sigmoid"] = "sigmoid"
    """softmax top-k, or DeepSeek-V3's sigmoid with a bias that acts on the selection only."""
    rule: Literal["top_k", "noisy_top_k", "expert_choice", "token_rounding", "hash"] = "top_k"
    """How scores become choices (moe/rules.py). expert_choice: experts choose tokens, so a token's
    route depends on later ones. token_rounding: in training, loads are rounded to rounding_tile.
    hash: a fixed hash of the token id, the baseline."""
    allow_acausal: bool = False
    """Let rule=expert_choice train an autoregressive model: it then sees which later tokens compete
    for its experts, and its validation loss is too good."""
    rounding_tile: int = 64
    """token_rounding: rows that an expert's load becomes a multiple of."""
    capacity_factor: float = 0.0
    """An expert computes at most ceil(factor · T K / E) tokens of a device's share of the batch,
    the first ones, and drops the others; 0: dropless. expert_choice: the tokens that an expert
    takes (0 means 1)."""
    normalise: bool = True
    """Divide the K selected weights by their sum."""
    scale: float = 1.0
    """Factor on the routed experts' weights, after normalisation."""
    groups: int = 1
    """Group-limited selection: experts are split into this many groups, ..."""
    groups_per_token: int = 1
    """... of which a token may use this many, the best by group_score."""
    group_score: Literal["auto", "max", "top2", "node"] = "auto"
    """A group's score: its best score (DeepSeek-V2), the sum of its best 2 (DeepSeek-V3's code), or
    of its best experts_per_token / groups_per_token (node-limited routing as the V3 report has
    it). auto: top2 with the sigmoid gate, max with softmax."""
    bias_rate: float = 0.001
    """Auxiliary-loss-free balance: step of the router bias after each update; 0 turns it off.
    Needs the sigmoid gate."""
    bias_until: float = 1.0
    """Fraction of training after which the router bias is frozen."""
    sequence_loss: float = 1e-4
    """Weight of the sequence-wise balance loss; 0 turns it off."""
    expert_loss: float = 0.0
    """Weight of the expert-level balance loss (DeepSeekMoE); 0 turns it off."""
    device_loss: float = 0.0
    """Weight of the device-level balance loss over the groups (DeepSeekMoE); 0 turns it off."""
    locality_loss: float = 0.0
    """Weight of the locality loss, which keeps a token with the experts of those just before it, so
    that decoding with experts in tiers fetches fewer; 0 turns it off."""
    z_loss: float = 0.0
    """Weight of the router z-loss, mean(logsumexp(logits)^2); 0 turns it off."""
    implementation: Literal["auto", "reference", "xla", "triton"] = "auto"
    """Expert dispatch (moe/layer.py): the best that can run here, or one by name. triton needs an
    NVIDIA GPU of compute capability 8.0 or more."""
    precision: Literal["compute", "fp8"] = "compute"
    """Operands of the routed experts' forward products: in compute_dtype, or FP8 (E4M3 in tiles of
    1x128 and 128x128, DeepSeek-V3 §3.3); gradients stay in compute_dtype. fp8 is fast with triton
    on compute capability 8.9 or more; xla emulates its numerics anywhere."""
    fp8_scales: Literal["float32", "power_of_two"] = "float32"
    """fp8: the scale of a tile, as it is or rounded up to a power of two."""

    def __post_init__(self) -> None:
        owner = "model.moe"
        _positive(owner, self, "experts", "experts_per_token", "expert_hidden", "groups")
        _positive(owner, self, "groups_per_token", "scale")
        _not_negative(owner, self, "shared_experts", "bias_rate", "capacity_factor")
        _not_negative(owner, self, "sequence_loss", "expert_loss", "device_loss", "z_loss")
        _not_negative(owner, self, "locality_loss")
        _positive(owner, self, "rounding_tile")
        _fraction(owner, self, "bias_until")
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
            self.gate == "sigmoid" or self.bias_rate == 0,
            f"{owner}.bias_rate={self.bias_rate} needs gate=sigmoid: softmax routing has no "
            "selection bias (set bias_rate to 0)",
        )
        require(
            self.precision != "fp8" or self.implementation != "reference",
            f"{owner}.precision=fp8 needs implementation auto, xla or triton: reference computes "
            "in compute_dtype alone",
        )
        require(
            self.precision == "fp8" or self.fp8_scales == "float32",
            f"{owner}.fp8_scales={self.fp8_scales} needs precision=fp8",
        )
        self._check_rule(owner)

    def _check_rule(self, owner: str) -> None:
        rule = f"{owner}.rule={self.rule}"
        require(
            self.rule != "expert_choice" or self.allow_acausal,
            f"{rule} is not causal: a token's route depends on later tokens, so the model sees the "
            "future; set allow_acausal to train with it all the same",
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
        require(
            self.device_loss == 0 or self.groups > 1,
            f"{owner}.device_loss={self.device_loss} needs groups of experts: with groups=1 it is "
            "constant",
        )

    @property
    def slots(self) -> int:
        """Experts that a token may be given: K, or up to 4 K where the experts have a say."""
        free = self.rule in ("expert_choice", "token_rounding")
        return min(self.experts, 4 * self.experts_per_token if free else self.experts_per_token)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: `dense_layers` dense blocks, then mixture-of-experts blocks."""

    vocabulary: int | None = None
    """Rows of the embedding (V); unset, as many as the tokenizer has."""
    width: int = 256
    """Width of the residual stream (D)."""
    layers: int = 4
    """Transformer blocks, dense ones included."""
    dense_layers: int = 1
    """The first blocks that have a dense feed-forward instead of experts; at least one block
    stays a mixture of experts unless this equals `layers` (a dense model)."""
    dense_hidden: int = 512
    """Hidden width of the dense feed-forward."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mtp_depth: int = 0
    """Multi-token prediction: further tokens predicted, one module each (DeepSeek-V3 §2.2)."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss (averaged over depths)."""
    tied_embedding: bool = True
    """The output head is the transposed embedding."""
    norm_epsilon: float = 1e-6
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    init_std: float = 0.02
    """Standard deviation of the normal initialisation."""
    dropout: float = 0.0
    """In training, the share of the embedding and of what each attention and feed-forward adds to
    the residual stream that is set to 0, the rest scaled up (arXiv:1706.03762, §5.4)."""
    param_dtype: DType = "float32"
    """Parameters and optimizer moments."""
    compute_dtype: DType = "float32"
    """Matrix products and activations."""
    output_dtype: DType = "float32"
    """Logits as the model returns them; the loss is always taken in float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """Rematerialise in the backward pass: nothing, all but matrix products, or whole blocks."""
    unroll: int = 1
    """Blocks that are laid out in a row inside the scan over blocks: more make a small model
    faster (no stacking of what the backward pass needs), and a deep one slow to compile."""

    def __post_init__(self) -> None:
        owner = "model"
        _positive(owner, self, "width", "layers", "norm_epsilon", "rope_base", "init_std")
        _positive(owner, self, "unroll")
        _not_negative(owner, self, "dense_layers", "mtp_depth", "mtp_weight")
        require(
            self.vocabulary is None or self.vocabulary > 0,
            f"{owner}.vocabulary is {self.vocabulary}: it must be positive",
        )
        require(0 <= self.dropout < 1, f"{owner}.dropout is {self.dropout}: it must lie in [0, 1)")
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


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    source: str = "stdlib"
    """`stdlib` (Python's own standard library), `files:GLOB`, or `hf:NAME` (pip install
    'moe_jax[hf]')."""
    text_field: str = "text"
    """hf: the column that holds the text."""
    tokenizer: str = "bpe:4096"
    """`bytes`, or `bpe:N`: byte-level BPE with N entries, trained once on the corpus."""
    length: int = 256
    """Tokens in one sequence (L)."""
    validation_fraction: float = 0.02
    """Share of the files (by a hash of their names) that is held out."""
    validation_tokens: int = 1_000_000
    """At most so many tokens of the held-out text are evaluated, the first ones."""
    cache: str = ""
    """Folder for tokenised corpora; unset, $XDG_CACHE_HOME/moe_jax or ~/.cache/moe_jax."""

    def __post_init__(self) -> None:
        owner = "data"
        kind, _, argument = self.source.partition(":")
        require(
            self.source == "stdlib" or (kind in ("files", "hf") and argument != ""),
            f"{owner}.source '{self.source}' is unknown: use stdlib, files:GLOB or hf:NAME",
        )
        require(
            self.tokenizer == "bytes"
            or (self.tokenizer.startswith("bpe:") and self.tokenizer[4:].isdigit()),
            f"{owner}.tokenizer '{self.tokenizer}' is unknown: use bytes or bpe:N",
        )
        if self.tokenizer != "bytes":
            require(
                self.vocabulary >= 258,
                f"{owner}.tokenizer '{self.tokenizer}' is too small: bpe:N needs N of at least "
                "258 (256 bytes and 2 special tokens)",
            )
        _positive(owner, self, "length", "validation_tokens")
        require(
            0 < self.validation_fraction < 1,
            f"{owner}.validation_fraction is {self.validation_fraction}: it must lie strictly "
            "between 0 and 1",
        )

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the tokenizer may produce."""
        return 258 if self.tokenizer == "bytes" else int(self.tokenizer[4:])


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After warm-up: cosine decay, or constant and then linear decay (warm-up, stable, decay)."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rate rises linearly from 0."""
    decay: float = 0.2
    """wsd: fraction of the steps, at the end, over which the learning rate falls."""
    final: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay; applied to matrices, never to norms or embeddings."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    accumulation: int = 1
    """Micro-batches whose gradients are averaged into one update."""
    max_skipped: int = 5
    """Stop after this many non-finite updates in a row."""

    def __post_init__(self) -> None:
        owner = "optim"
        _positive(owner, self, "learning_rate", "epsilon", "accumulation", "max_skipped")
        _not_negative(owner, self, "weight_decay", "clip_norm")
        _fraction(owner, self, "warmup", "decay", "final")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{owner}.{name} is {value}: it must be in [0, 1)")
        require(
            self.schedule == "cosine" or self.warmup + self.decay <= 1,
            f"{owner}.warmup={self.warmup} and decay={self.decay} add up to more than 1",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved and what is kept."""

    every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Latest checkpoints kept; the one with the best validation loss is kept besides."""

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "every")
        require(
            self.keep >= 2,
            f"checkpoint.keep is {self.keep}: it must be at least 2, so that a kill during one "
            "save leaves another",
        )


@dataclass(frozen=True)
class PlacementConfig:
    """Where the routed experts live while a model is trained (train/tiers.py).

    Sizes are like 2GB, 512MB, 1.5GiB or plain bytes. No budget and no policy changes a result.
    """

    device_budget: str = ""
    """Device memory for the routed experts: parameters, optimizer moments and gradients, those of
    the layer at work included. What does not fit lives below, in host memory or on disk, and
    comes when it is needed. Unset: everything stays on the device."""
    host_budget: str = ""
    """Host memory for the next hottest experts; the others are on disk."""
    policy: Literal["lru", "lfu", "decayed_lfu", "lfru", "successor"] = "decayed_lfu"
    """Who stays on the device (placement/policy.py), by the measured load."""
    mode: Literal["sparse", "exact"] = "sparse"
    """What an update does to experts that no token chose. sparse: nothing, neither decay of their
    moments nor weight decay (lazy AdamW). exact: what the optimizer does without tiers, made up
    for when they are next needed."""
    direct: bool = False
    """Read and write the disk around the operating system's page cache (O_DIRECT, Linux), so that
    no host memory stands in for the disk."""
    folder: str = ""
    """Folder for the experts on disk while the run goes on; unset, `shelf` in the run's folder."""

    def __post_init__(self) -> None:
        for name in ("device_budget", "host_budget"):
            if getattr(self, name):
                parse_bytes(f"placement.{name}", getattr(self, name))
        require(
            self.device_budget != "" or self.host_budget == "",
            f"placement.host_budget={self.host_budget} needs placement.device_budget: without it "
            "everything stays on the device",
        )

    @property
    def tiered(self) -> bool:
        """Whether experts live below the device."""
        return self.device_budget != ""

    @property
    def device_bytes(self) -> int:
        """The device budget, 0 where it is unset."""
        return parse_bytes("placement.device_budget", self.device_budget or "0")

    @property
    def host_bytes(self) -> int:
        """The host budget, 0 where it is unset."""
        return parse_bytes("placement.host_budget", self.host_budget or "0")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. `python experiments/train.py PRESET --model.moe.experts 32 …`"""

    preset: tyro.conf.Suppress[str] = "custom"
    """Name of the preset that these settings started from."""
    out: str = ""
    """Folder of the run; unset, runs/PRESET-HASH, one folder for each set of settings. The same
    command continues the run that is there."""
    seed: int = 0
    """Seed of initialisation, data order and sampling."""
    steps: int = 600
    """Optimizer updates."""
    batch: int = 8
    """Sequences in one update (B), over all micro-batches and devices."""
    evaluate_every: int = 200
    """Steps between passes over the validation text; the last step always has one."""
    samples: int = 3
    """Continuations sampled at the end."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "evaluate_every"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}: it must be positive")
        require(self.seed >= 0, f"seed is {self.seed}: it must not be negative")
        require(self.samples >= 0, f"samples is {self.samples}: it must not be negative")
        require(
            self.batch % self.optim.accumulation == 0,
            f"optim.accumulation={self.optim.accumulation} does not divide batch={self.batch}",
        )
        vocabulary, taught = self.model.vocabulary, self.distill.teacher != ""
        require(
            taught or self.distill == DistillConfig(),
            "the settings of distill need a teacher: set distill.teacher",
        )
        require(
            not taught or not self.placement.tiered,
            f"distill.teacher={self.distill.teacher} and placement.device_budget="
            f"{self.placement.device_budget}: training with tiers takes no teacher yet, unset one",
        )
        self.distill.check_length(self.data.length)
        require(  # a teacher brings its own tokenizer (train/teaching.py)
            taught or vocabulary is None or vocabulary >= self.data.vocabulary,
            f"model.vocabulary={vocabulary} is smaller than the {self.data.vocabulary} tokens of "
            f"data.tokenizer '{self.data.tokenizer}'",
        )

    def resolved_model(self) -> ModelConfig:
        """The model's settings with the vocabulary filled in from the tokenizer if unset."""
        vocabulary = self.model.vocabulary or self.data.vocabulary
        return dataclasses.replace(self.model, vocabulary=vocabulary)


def fields(settings: Any) -> dict[str, Any]:
    """Every field of a (nested) dataclass instance: dotted name -> value."""
    flat = {}
    for name in (f.name for f in dataclasses.fields(settings)):
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{name}.{inner}": v for inner, v in fields(value).items()}
        else:
            flat[name] = value
    return flat


def from_dict(saved: dict[str, Any]) -> TrainConfig:
    """The config that a checkpoint holds as a dictionary (dataclasses.asdict undone)."""
    model = dict(saved["model"])
    model["attention"] = AttentionConfig(**model["attention"])
    model["moe"] = MoEConfig(**model["moe"])
    parts = {
        "model": ModelConfig(**model),
        "data": DataConfig(**saved["data"]),
        "optim": OptimConfig(**saved["optim"]),
        "checkpoint": CheckpointConfig(**saved["checkpoint"]),
        "placement": PlacementConfig(**saved.get("placement", {})),
        "distill": DistillConfig(**saved.get("distill", {})),
    }
    return TrainConfig(**{**saved, **parts})
