"""Our settings for a config.json of transformers (versions 4 and 5), by the table of families."""

from typing import Any

from moe_jax.base.errors import UserError, quote, require
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.config import fields as flat_fields
from moe_jax.interop.assemble import Layout
from moe_jax.interop.fields import Fields
from moe_jax.interop.hugging_face.families import (
    FAMILIES,
    IGNORED,
    REQUIRED,
    ROPE,
    Family,
    Setting,
)
from moe_jax.interop.hugging_face.rope import read_rope

QWEN3_HEAD_DIM = 128
"""Of a config.json of qwen3 without head_dim, whatever its width."""
LATENT_EPSILON = 1e-6
"""The epsilon of the norms of DeepSeek's latents, whatever rms_norm_eps is."""
NOT_NEGATIVE = ("dense_layers", "moe.shared_experts")
"""Settings that may be 0."""


def family_of(values: dict[str, Any]) -> Family:
    """The family of a config.json. UserError: it is not supported."""
    kind = Fields(values).text("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type {quote(kind)} is not supported: use {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def read_config(values: dict[str, Any]) -> ModelConfig:
    """Our settings for config.json. UserError: another kind of model, a field is missing, absurd or
    not supported, or a field is unknown here."""
    fields = Fields(values)
    family = family_of(values)
    _require_supported(fields, family)
    ours = {setting.ours: _value(fields, setting) for setting in family.settings}
    ours |= {name: value for name, value in family.implied.items() if name != "moe_layers"}
    if "moe_layers" in family.implied:
        ours["dense_layers"] = ours["layers"]
    latent = ours["attention.kind"] == "mla"
    ours |= _latent(fields, family, ours) if latent else _grouped(fields, family, ours)
    if "mlp_only_layers" in family.special:
        ours["dense_layers"] = _first_dense(fields, ours["layers"])
    if family.mtp:
        ours["mtp_depth"] = fields.count("num_nextn_predict_layers", 0)
    if not ours["mtp_depth"]:
        ours.pop("mtp_input", None)
    base, yarn = read_rope(fields, latent=latent, base=family.rope_base, part=family.rotated_part)
    inner = {part: _part(ours, part) for part in ("attention", "moe")}
    return ModelConfig(
        **{name: value for name, value in ours.items() if "." not in name},
        attention=AttentionConfig(**inner["attention"]),
        moe=MoEConfig(**inner["moe"]),
        rope_base=base,
        yarn=yarn,
    )


def read_layout(values: dict[str, Any]) -> Layout:
    """How the tensors beside a config.json are named and ordered."""
    family = family_of(values)
    # transformers' version of V2 always turns neighbouring rows. V3 has a switch.
    interleaved = family.model_type == "deepseek_v2" or (
        family.model_type == "deepseek_v3" and Fields(values).flag("rope_interleave", True)
    )
    return Layout(family.format, interleaved)


def _part(ours: dict[str, Any], part: str) -> dict[str, Any]:
    prefix = f"{part}."
    return {n.removeprefix(prefix): value for n, value in ours.items() if n.startswith(prefix)}


def _require_supported(fields: Fields, family: Family) -> None:
    for name, supported in family.fixed.items():
        value = fields.get(name, supported)
        if value != supported:
            raise UserError(f"{name}={quote(value)} is not supported: only {supported!r} is")
    if set(fields.entries("layer_types")) - {"full_attention"}:
        raise UserError("layer_types other than full_attention are not supported")
    known = {*IGNORED, *ROPE, *family.fixed, *family.special, "quantization_config"}
    for setting in family.settings:
        known |= {setting.theirs, setting.other_name}
    for name in sorted(fields.names() - known):
        value = fields.get(name)
        # Most versions of transformers write switches that are off.
        require(
            value is False or value in ([], {}, ""),
            f"{quote(name)}: {quote(value)} is not known of a {family.model_type} model: remove it "
            "from config.json if it does not change the model",
        )


TYPES = {name: type(value) for name, value in flat_fields(ModelConfig(vocabulary=1)).items()}


def _value(fields: Fields, setting: Setting) -> Any:
    default = None if setting.default is REQUIRED else setting.default
    if setting.other_name:
        default = fields.get(setting.other_name, default)
    kind = TYPES[setting.ours]
    if kind is bool:
        return fields.flag(setting.theirs, bool(default))
    if kind is float:
        return fields.number(setting.theirs, default)
    read = fields.count if setting.ours in NOT_NEGATIVE else fields.integer
    return read(setting.theirs, default)


def _grouped(fields: Fields, family: Family, ours: dict[str, Any]) -> dict[str, Any]:
    heads = ours["attention.heads"]
    qwen = family.model_type.startswith("qwen3")
    head_dim = QWEN3_HEAD_DIM if qwen else max(ours["width"] // heads, 1)
    result: dict[str, Any] = {
        "attention.kv_heads": fields.integer("num_key_value_heads", heads),
        "attention.head_dim": fields.integer("head_dim", head_dim),
    }
    if "use_qk_norm" in family.special:
        result["attention.qk_norm"] = "head" if fields.flag("use_qk_norm") else "none"
    return result


def _latent(fields: Fields, family: Family, ours: dict[str, Any]) -> dict[str, Any]:
    heads = ours["attention.heads"]
    kv_heads = fields.integer("num_key_value_heads", heads)
    require(
        kv_heads == heads,
        f"num_key_value_heads={kv_heads} is not supported with latent attention: only "
        f"num_attention_heads={heads} is",
    )
    epsilon = ours["norm_epsilon"]
    require(
        epsilon == LATENT_EPSILON,
        f"rms_norm_eps={epsilon} is not supported with latent attention: only {LATENT_EPSILON} is, "
        "which the norms of its latents have",
    )
    rank = fields.get("q_lora_rank")
    result = {"attention.q_rank": 0 if rank is None else fields.integer("q_lora_rank")}
    if "topk_method" in family.special:
        result |= _groups_of_v2(fields)
    return result


def _groups_of_v2(fields: Fields) -> dict[str, int]:
    method = fields.text("topk_method", "greedy")
    if method == "greedy":
        return {}
    require(
        method == "group_limited_greedy",
        f"topk_method={quote(method)} is not supported: only greedy and group_limited_greedy are",
    )
    return {
        "moe.groups": fields.integer("n_group"),
        "moe.groups_per_token": fields.integer("topk_group"),
    }


def _first_dense(fields: Fields, layers: int) -> int:
    """Number of dense blocks. Ours can only come first."""
    dense = fields.entries("mlp_only_layers")
    if dense != list(range(len(dense))) or len(dense) > layers:
        raise UserError(
            f"mlp_only_layers={quote(dense)} is not supported: only the first blocks are"
        )
    return len(dense)
