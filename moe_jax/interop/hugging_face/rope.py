"""Rotary embedding in config.json: its base, and YaRN."""

import math
from typing import Any

from moe_jax.base.errors import UserError, quote
from moe_jax.config import ModelConfig, YarnConfig
from moe_jax.interop.fields import Fields

KNOWN = {
    *("rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "beta_fast"),
    *("beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings"),
    *("attention_factor", "truncate"),
}


def read_rope(
    fields: Fields, *, latent: bool, base: float, part: float
) -> tuple[float, YarnConfig]:
    """(base, YaRN) of a config.json. `base` and `part` (partial_rotary_factor) are its defaults.

    UserError: another kind of scaling, or a part of each head is rotated.
    """
    # transformers 5 moved rope_theta into rope_parameters; version 4 has it at the top.
    rope = Fields(fields.object("rope_parameters") or fields.object("rope_scaling"))
    base = rope.number("rope_theta", fields.get("rope_theta", base), most=1e12)
    part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", part))
    if part != 1.0:
        raise UserError(
            f"partial_rotary_factor={quote(part)} is not supported: only whole heads are rotated"
        )
    kind = rope.text("rope_type", rope.text("type", "default"))
    unknown = rope.names() - KNOWN
    if kind not in ("default", "yarn") or unknown:
        extra = f" with {quote(min(unknown))}" if unknown else ""
        raise UserError(f"rope scaling ({quote(kind)}{extra}) is not supported: only yarn is")
    if kind == "default":
        return base, YarnConfig()
    yarn = YarnConfig(
        factor=rope.number("factor"),
        original_length=rope.integer(
            "original_max_position_embeddings", fields.get("max_position_embeddings")
        ),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        # DeepSeek's code has these defaults. transformers ignores one of them without the other.
        mscale=_scale(rope, "mscale", 1.0),
        mscale_all_dim=_scale(rope, "mscale_all_dim", 0.0),
    )
    _require_same_elsewhere(rope, yarn, latent)
    return base, yarn


def _scale(rope: Fields, name: str, default: float) -> float:
    value = rope.get(name, default)
    # 0 is a value of its own: m(0) = 1. By type(), because False == 0.
    return 0.0 if type(value) in (int, float) and value == 0 else rope.number(name, default)


def _require_same_elsewhere(rope: Fields, yarn: YarnConfig, latent: bool) -> None:
    """UserError: a field changes the model in a way that YarnConfig does not have."""
    if not latent and (yarn.mscale, yarn.mscale_all_dim) != (1.0, 0.0):
        raise UserError(
            f"mscale={yarn.mscale} with mscale_all_dim={yarn.mscale_all_dim} is not supported "
            "without latent attention: only 1.0 with 0.0 is"
        )
    factor = rope.get("attention_factor")
    if factor is not None and not math.isclose(
        rope.number("attention_factor"), yarn.rotary_factor, rel_tol=1e-6
    ):
        raise UserError(
            f"attention_factor={quote(factor)} is not supported: only {yarn.rotary_factor} is, "
            "which follows from factor and the mscales"
        )
    if not rope.flag("truncate", True):
        raise UserError("rope scaling with truncate=False is not supported")


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json, as transformers 4 has them and version 5 reads them, too."""
    yarn = config.yarn
    if yarn.factor == 1:
        return {"rope_theta": config.rope_base, "rope_scaling": None}
    scaling: dict[str, Any] = {
        # Two names for two versions.
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if config.attention.kind == "mla":
        scaling |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    return {"rope_theta": config.rope_base, "rope_scaling": scaling}
