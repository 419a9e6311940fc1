"""The published families: what their config.json says, and which settings of ours it stands for.

One table for both directions. A setting of ours that changes what a model computes stands in a
family's `settings`, in its `implied`, in its `special`, or in none of them: then it must have its
default value. TRAINING lists the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moe_jax.interop.names import Format

REQUIRED = object()
"""Default of a field that a config.json must have."""


class Setting(NamedTuple):
    """A field of config.json and the setting of ours that has its value."""

    theirs: str
    ours: str
    """Dotted path in ModelConfig."""
    default: Any = REQUIRED
    """The value of a config.json without the field."""
    other_name: str = ""
    """A second name of the field, which some versions write."""


@dataclass(frozen=True)
class Family:
    """A kind of model, by the model_type of its config.json."""

    model_type: str
    architecture: str
    """The class in transformers."""
    settings: tuple[Setting, ...]
    implied: Mapping[str, Any]
    """Settings of ours that every model of the family has."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that change the model, and the value that is supported. An absent
    field has this value."""
    special: tuple[str, ...] = ()
    """Fields of config.json that config.py reads and writes by a rule of its own."""
    format: Format = "hugging_face"
    mtp: bool = False
    """Whether files may hold modules of multi-token prediction."""
    rope_base: float = 10_000.0
    """Of a config.json without one."""
    rotated_part: float = 1.0
    """partial_rotary_factor of a config.json without one."""
    in_transformers: bool = True


_COMMON = (
    Setting("vocab_size", "vocabulary"),
    Setting("hidden_size", "width"),
    Setting("num_hidden_layers", "layers"),
    Setting("rms_norm_eps", "norm_epsilon"),
    Setting("tie_word_embeddings", "tied_embedding", False),
    Setting("num_attention_heads", "attention.heads"),
)
_DENSE = Setting("intermediate_size", "dense_hidden")
_MIXTURE = (
    Setting("num_experts_per_tok", "moe.experts_per_token"),
    Setting("moe_intermediate_size", "moe.expert_hidden"),
)
_LATENT = (
    Setting("kv_lora_rank", "attention.kv_rank"),
    Setting("qk_nope_head_dim", "attention.nope_dim"),
    Setting("qk_rope_head_dim", "attention.rope_dim"),
    Setting("v_head_dim", "attention.v_dim"),
)
_GROUPED = {"attention.kind": "gqa", "mtp_depth": 0}
_SOFTMAX = {"moe.gate": "softmax", "moe.bias_rate": 0.0, "moe.scale": 1.0}
_PLAIN = {"hidden_act": "silu", "attention_bias": False}
_HEADS = ("num_key_value_heads", "head_dim")

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    (*_COMMON, _DENSE),
    {**_GROUPED, "attention.qk_norm": "none", "moe_layers": 0},
    {**_PLAIN, "mlp_bias": False},
    _HEADS,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    (*_COMMON, _DENSE),
    {**_GROUPED, "attention.qk_norm": "head", "moe_layers": 0},
    {**_PLAIN, "use_sliding_window": False},
    _HEADS,
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    (
        *_COMMON,
        Setting("num_local_experts", "moe.experts", other_name="num_experts"),
        Setting("num_experts_per_tok", "moe.experts_per_token"),
        Setting("intermediate_size", "moe.expert_hidden"),
    ),
    {
        **_GROUPED,
        **_SOFTMAX,
        "attention.qk_norm": "none",
        "dense_layers": 0,
        "moe.shared_experts": 0,
        "moe.normalise": True,
    },
    {**_PLAIN, "sliding_window": None},
    _HEADS,
    format="mixtral",
    rope_base=1e6,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    (
        *_COMMON,
        _DENSE,
        *_MIXTURE,
        # transformers 5 calls it num_local_experts.
        Setting("num_experts", "moe.experts", other_name="num_local_experts"),
        Setting("norm_topk_prob", "moe.normalise", False),
    ),
    {**_GROUPED, **_SOFTMAX, "attention.qk_norm": "head", "moe.shared_experts": 0},
    {**_PLAIN, "use_sliding_window": False, "decoder_sparse_step": 1},
    (*_HEADS, "mlp_only_layers"),
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    (
        *_COMMON,
        Setting("num_experts", "moe.experts", other_name="num_local_experts"),
        Setting("num_experts_per_tok", "moe.experts_per_token"),
        Setting("intermediate_size", "moe.expert_hidden"),
        Setting("norm_topk_prob", "moe.normalise", False),
    ),
    {
        **_GROUPED,
        **_SOFTMAX,
        "attention.qk_norm": "full",
        "dense_layers": 0,
        "moe.shared_experts": 0,
    },
    {**_PLAIN, "clip_qkv": None},
    _HEADS,
)
DEEPSEEK = Family(
    "deepseek",
    "DeepseekForCausalLM",
    (
        *_COMMON,
        _DENSE,
        *_MIXTURE,
        Setting("n_routed_experts", "moe.experts"),
        Setting("n_shared_experts", "moe.shared_experts", 0),
        Setting("first_k_dense_replace", "dense_layers", 0),
        Setting("norm_topk_prob", "moe.normalise", False),
    ),
    {**_GROUPED, **_SOFTMAX, "attention.qk_norm": "none"},
    {**_PLAIN, "scoring_func": "softmax", "moe_layer_freq": 1},
    _HEADS,
    in_transformers=False,
)
GLM4_MOE = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    (
        *_COMMON,
        _DENSE,
        *_MIXTURE,
        Setting("n_group", "moe.groups", 1),
        Setting("topk_group", "moe.groups_per_token", 1),
        Setting("n_routed_experts", "moe.experts", other_name="num_experts"),
        Setting("n_shared_experts", "moe.shared_experts", 1),
        Setting("first_k_dense_replace", "dense_layers", 1),
        Setting("norm_topk_prob", "moe.normalise", True),
        Setting("routed_scaling_factor", "moe.scale", 1.0),
    ),
    {"attention.kind": "gqa", "moe.gate": "sigmoid", "mtp_input": "normed"},
    _PLAIN,
    (*_HEADS, "use_qk_norm", "num_nextn_predict_layers"),
    mtp=True,
    rotated_part=0.5,
)
_DEEPSEEK_EXPERTS = (
    *_COMMON,
    _DENSE,
    *_MIXTURE,
    *_LATENT,
    Setting("n_routed_experts", "moe.experts", other_name="num_local_experts"),
    Setting("n_shared_experts", "moe.shared_experts"),
    Setting("first_k_dense_replace", "dense_layers"),
    Setting("routed_scaling_factor", "moe.scale"),
)
DEEPSEEK_V2 = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    _DEEPSEEK_EXPERTS,
    {
        "attention.kind": "mla",
        "mtp_depth": 0,
        "moe.gate": "softmax",
        "moe.bias_rate": 0.0,
        "moe.normalise": False,
    },
    {
        **_PLAIN,
        "mlp_bias": False,
        "scoring_func": "softmax",
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
    },
    ("num_key_value_heads", "q_lora_rank", "topk_method", "n_group", "topk_group"),
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    (
        *_DEEPSEEK_EXPERTS,
        Setting("n_group", "moe.groups"),
        Setting("topk_group", "moe.groups_per_token"),
        Setting("norm_topk_prob", "moe.normalise", True),
    ),
    {"attention.kind": "mla", "moe.gate": "sigmoid", "mtp_input": "normed"},
    {**_PLAIN, "scoring_func": "sigmoid", "moe_layer_freq": 1, "topk_method": "noaux_tc"},
    ("num_key_value_heads", "q_lora_rank", "num_nextn_predict_layers", "rope_interleave"),
    mtp=True,
)

FAMILIES = {
    family.model_type: family
    for family in (
        *(LLAMA, QWEN3, MIXTRAL, QWEN3_MOE, OLMOE),
        *(DEEPSEEK, GLM4_MOE, DEEPSEEK_V2, DEEPSEEK_V3),
    )
}
"""In the order in which save looks for one."""

DEFAULTED = (
    *("moe.rule", "moe.capacity_factor", "moe.group_score", "moe.groups", "moe.groups_per_token"),
    *("mtp_depth", "mtp_input"),
)
"""Settings that change a model and that a family which does not name them has at their default."""
TRAINING = frozenset(
    {
        *("mtp_weight", "init_std", "dropout", "param_dtype", "compute_dtype", "gradient_dtype"),
        *("output_dtype", "remat", "unroll", "attention.implementation", "moe.allow_acausal"),
        *("moe.rounding_tile", "moe.bias_rate", "moe.bias_until", "moe.sequence_loss"),
        *("moe.expert_loss", "moe.device_loss", "moe.locality_loss", "moe.z_loss"),
        *("moe.implementation", "moe.precision", "moe.fp8_scales"),
    }
)
"""Settings of how a model is trained and computed, which no config.json has."""

ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
IGNORED = frozenset(
    {
        *("architectures", "auto_map", "model_type", "transformers_version", "_name_or_path"),
        *("dtype", "torch_dtype", "initializer_range", "use_cache", "pretraining_tp", "ep_size"),
        *("max_position_embeddings", "attention_dropout", "output_router_logits"),
        *("router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "head_dim"),
        *("qk_head_dim", "layer_types", "sliding_window", "max_window_layers", "num_mtp_layers"),
        *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
        *("is_llama_config", "transformers.js_config", "unsloth_version", "unsloth_fixed"),
        *(
            "_attn_implementation_autoset",
            "is_encoder_decoder",
            "id2label",
            "label2id",
            "problem_type",
            "tokenizer_class",
        ),
    }
)
"""Fields of config.json that change nothing that a model computes, or that another field decides:
sliding_window is used where use_sliding_window is true."""
