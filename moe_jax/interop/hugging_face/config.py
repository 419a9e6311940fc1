"""Our settings for a config.json of transformers (versions 4 and 5)."""

from typing import Any

from moe_jax.base.errors import UserError, quote
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.interop.fields import Fields

MODEL_TYPES = ("llama", "qwen3", "qwen3_moe")
SUPPORTED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "decoder_sparse_step": 1,
}
"""Settings that change the model and are supported at one value, which is their default, only."""
QWEN3_HEAD_DIM = 128
"""Of a config.json of qwen3 without head_dim, whatever its width."""


def read_config(values: dict[str, Any]) -> ModelConfig:
    """Our settings for config.json. UserError: another kind of model, or a field is missing or
    absurd."""
    fields = Fields(values)
    _require_supported(fields)
    kind = fields.text("model_type")
    sparse = kind == "qwen3_moe"
    layers = fields.integer("num_hidden_layers")
    return ModelConfig(
        vocabulary=fields.integer("vocab_size"),
        width=fields.integer("hidden_size"),
        layers=layers,
        dense_layers=_dense_layers(fields, layers) if sparse else layers,
        dense_hidden=fields.integer("intermediate_size"),
        attention=_attention(fields, qwen=kind != "llama"),
        moe=_experts(fields) if sparse else MoEConfig(),
        tied_embedding=fields.flag("tie_word_embeddings"),
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        rope_base=_rope_base(fields),
    )


def _require_supported(fields: Fields) -> None:
    kind = fields.text("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"model_type {quote(kind)} is not supported: use llama, qwen3 or qwen3_moe")
    for name, supported in SUPPORTED_VALUES.items():
        value = fields.get(name, supported)
        if value != supported:
            raise UserError(f"{name}={quote(value)} is not supported: only {supported!r} is")
    if set(fields.entries("layer_types")) - {"full_attention"}:
        raise UserError("layer_types other than full_attention are not supported")


def _attention(fields: Fields, *, qwen: bool) -> AttentionConfig:
    heads = fields.integer("num_attention_heads")
    head_dim = QWEN3_HEAD_DIM if qwen else max(fields.integer("hidden_size") // heads, 1)
    return AttentionConfig(
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", head_dim),
        qk_norm="head" if qwen else "none",
    )


def _experts(fields: Fields) -> MoEConfig:
    return MoEConfig(
        # transformers 5 calls it num_local_experts.
        experts=fields.integer("num_experts", fields.get("num_local_experts")),
        experts_per_token=fields.integer("num_experts_per_tok"),
        expert_hidden=fields.integer("moe_intermediate_size"),
        shared_experts=0,
        gate="softmax",
        normalise=fields.flag("norm_topk_prob"),
        bias_rate=0.0,
    )


def _dense_layers(fields: Fields, layers: int) -> int:
    """Number of dense blocks. Ours can only come first."""
    dense = fields.entries("mlp_only_layers")
    if dense != list(range(len(dense))) or len(dense) > layers:
        raise UserError(
            f"mlp_only_layers={quote(dense)} is not supported: only the first blocks are"
        )
    return len(dense)


def _rope_base(fields: Fields) -> float:
    # transformers 5 moved rope_theta into rope_parameters; version 4 has it at the top.
    rope = Fields(fields.object("rope_parameters") or fields.object("rope_scaling"))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"rope scaling ({quote(kind)}) is not supported: use a model without it")
    return rope.number("rope_theta", fields.get("rope_theta", 10_000.0), most=1e12)
