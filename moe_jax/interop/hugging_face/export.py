"""config.json for a model of ours: which published family can express it."""

from dataclasses import replace
from typing import Any

from moe_jax.base.errors import UserError
from moe_jax.config import ModelConfig, MoEConfig, YarnConfig
from moe_jax.config import fields as flat_fields
from moe_jax.interop.assemble import Layout
from moe_jax.interop.hugging_face.config import LATENT_EPSILON
from moe_jax.interop.hugging_face.families import DEFAULTED, FAMILIES, Family
from moe_jax.interop.hugging_face.rope import write_rope
from moe_jax.moe.rules import representatives

DEFAULTS = flat_fields(ModelConfig())


def canonical(config: ModelConfig) -> ModelConfig:
    """A config of the same computation, in which settings without effect have their default.

    Settings of training and of implementations are left as they are.
    """
    moe = config.moe
    if config.moe_layers == 0:
        moe = MoEConfig()
    if moe.rule == "token_rounding":
        moe = replace(moe, rule="top_k")  # it rounds in training alone
    if moe.groups_per_token == moe.groups:
        moe = replace(moe, groups=1, groups_per_token=1, group_score="auto", device_loss=0.0)
    else:
        automatic = representatives(replace(moe, group_score="auto"))
        summed = min(representatives(moe), moe.experts // moe.groups)
        moe = replace(moe, group_score="auto" if summed == automatic else moe.group_score)
    return replace(
        config,
        dense_hidden=config.dense_hidden if config.dense_layers else ModelConfig().dense_hidden,
        moe=moe,
        yarn=YarnConfig() if config.yarn.factor == 1 else config.yarn,
        mtp_input=config.mtp_input if config.mtp_depth else "residual",
    )


def family_for(config: ModelConfig) -> Family:
    """The first family that computes what `config` does.

    UserError: there is none. The line names the nearest family and the settings that it lacks.
    """
    problems = {name: mismatches(family, config) for name, family in FAMILIES.items()}
    nearest = min(problems, key=lambda name: len(problems[name]))
    if problems[nearest]:
        of_mtp = any(problem.startswith("mtp_") for problem in problems[nearest])
        way_out = " (mtp_depth=0, or --mtp drop of convert.py, leaves the modules out)"
        raise UserError(
            f"no published family computes this model: {nearest}, the nearest, has no "
            f"{', '.join(problems[nearest])}{way_out if of_mtp else ''}"
        )
    return FAMILIES[nearest]


def mismatches(family: Family, config: ModelConfig) -> list[str]:
    """The settings, with their values, that a family cannot express."""
    config = canonical(config)
    ours = flat_fields(config) | {"moe_layers": config.moe_layers}
    expressed = {setting.ours for setting in family.settings} | _by_rule(family)
    wanted = {name: DEFAULTS[name] for name in DEFAULTED if name not in expressed}
    wanted |= {n: value for n, value in family.implied.items() if n != "moe.bias_rate"}
    if not config.mtp_depth:
        wanted.pop("mtp_input", None)
    if config.moe_layers == 0:
        wanted = {n: value for n, value in wanted.items() if not n.startswith("moe.")}
    found = [n for n, value in wanted.items() if ours[n] != value]
    found += [n for n in _impossible(family, config) if n not in found]
    return [f"{name}={ours[name]}" for name in found]


def _by_rule(family: Family) -> set[str]:
    """Settings that the family's `special` fields express."""
    expressed = {"mtp_depth"} if family.mtp else set()
    if "use_qk_norm" in family.special:
        expressed.add("attention.qk_norm")
    if "topk_method" in family.special:
        expressed |= {"moe.groups", "moe.groups_per_token"}
    return expressed


def _impossible(family: Family, config: ModelConfig) -> list[str]:
    """Settings whose values the code of a family refuses or replaces."""
    attention = config.attention
    shared = any(s.theirs == "n_shared_experts" and s.default != 0 for s in family.settings)
    whole_heads = attention.heads * attention.head_dim == config.width
    checks = {
        # Their norms of the latents have an epsilon of their own.
        "norm_epsilon": attention.kind == "mla" and config.norm_epsilon != LATENT_EPSILON,
        "moe.shared_experts": shared and config.moe_layers > 0 and config.moe.shared_experts == 0,
        "mtp_depth": config.mtp_depth > 0 and config.moe_layers == 0,
        "attention.qk_norm": "use_qk_norm" in family.special and attention.qk_norm == "full",
        # transformers' classes of these two check it.
        "attention.heads": family.model_type in ("llama", "deepseek_v2")
        and config.width % attention.heads != 0,
        "attention.head_dim": family.model_type == "deepseek" and not whole_heads,
    }
    return [name for name, wrong in checks.items() if wrong]


def write_config(config: ModelConfig, bos: int, eos: int, length: int) -> dict[str, Any]:
    """config.json. `length`: the context, which transformers wants to know (where yarn does not
    say it). UserError: no family can express the model."""
    family = family_for(config)
    config = canonical(config)
    ours = flat_fields(config)
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{setting.theirs: ours[setting.ours] for setting in family.settings},
        **family.fixed,
        **_special(family, config),
        **write_rope(config),
        "max_position_embeddings": _length(config, length),
        "initializer_range": config.init_std,
        "bos_token_id": bos,
        "eos_token_id": eos,
        # Two names for two versions.
        "dtype": config.param_dtype,
        "torch_dtype": config.param_dtype,
    }
    if family.rotated_part != 1.0:
        values["partial_rotary_factor"] = 1.0
    return values


def write_layout(config: ModelConfig) -> Layout:
    """How the tensors beside that config.json are named and ordered."""
    family = family_for(config)
    return Layout(family.format, interleaved=config.attention.kind == "mla")


def _length(config: ModelConfig, length: int) -> int:
    yarn = config.yarn
    return length if yarn.factor == 1 else round(yarn.factor * yarn.original_length)


def _special(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The fields that config.py reads by a rule of its own."""
    c = config.attention
    limited = config.moe.groups > 1
    rules = {
        "num_key_value_heads": c.heads if c.kind == "mla" else c.kv_heads,
        "head_dim": c.head_dim,
        "mlp_only_layers": list(range(config.dense_layers)),
        "use_qk_norm": c.qk_norm == "head",
        "q_lora_rank": c.q_rank or None,
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "n_group": config.moe.groups,
        "topk_group": config.moe.groups_per_token,
        "num_nextn_predict_layers": config.mtp_depth,
        "rope_interleave": True,
    }
    return {name: rules[name] for name in family.special}
