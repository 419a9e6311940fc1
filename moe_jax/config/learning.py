"""Settings that are possible one by one, and together switch the learning of a part off."""

from typing import TYPE_CHECKING

from moe_jax.base.errors import require
from moe_jax.config.model import ModelConfig

if TYPE_CHECKING:
    from moe_jax.config.train import TrainConfig

ONE_CHOICE = ("top_k", "noisy_top_k", "token_rounding")
"""Rules by which a token gets exactly K experts, at least outside training."""


def check_learning(config: "TrainConfig") -> None:
    """UserError: the settings leave a part of the model without a gradient or without effect."""
    model = config.model
    require(
        model.mtp_depth == 0 or model.mtp_weight > 0,
        f"model.mtp_weight=0 trains none of the mtp_depth={model.mtp_depth} modules: set "
        "model.mtp_depth to 0",
    )
    if model.moe_layers:
        _check_router(model)
        _check_rounding(config)


def _check_router(model: ModelConfig) -> None:
    moe = model.moe
    owner = "model.moe"
    require(
        not (moe.normalise and moe.experts_per_token == 1 and moe.rule in ONE_CHOICE),
        f"{owner}.experts_per_token=1 with normalise makes every weight s/s = 1, so the loss does "
        f"not train the router: set {owner}.normalise to false",
    )
    require(
        moe.experts > 1 or moe.gate == "sigmoid" or moe.rule == "hash",
        f"{owner}.experts=1 with gate=softmax makes every score 1, so the loss does not train the "
        "router: use more experts, or a dense model (model.dense_layers)",
    )
    require(
        moe.bias_rate == 0 or moe.bias_until > 0,
        f"{owner}.bias_until=0 freezes the router bias before its first change: set "
        f"{owner}.bias_rate={moe.bias_rate} to 0",
    )


def _check_rounding(config: "TrainConfig") -> None:
    moe = config.model.moe
    tokens = config.batch // config.optim.accumulation * config.data.length
    load = tokens * moe.experts_per_token / moe.experts
    require(
        moe.rule != "token_rounding" or load >= moe.rounding_tile / 2,
        f"model.moe.rounding_tile={moe.rounding_tile} rounds the mean load of {load:g} tokens an "
        "expert to 0: the experts would compute nothing, so make the tile smaller or the batch "
        "larger",
    )


def not_trained(model: ModelConfig) -> dict[str, str]:
    """Parts that the loss does not train, each with the reason. Parts are roles of parameters."""
    parts = {}
    if model.moe_layers and model.moe.rule == "hash":
        parts["router"] = "model.moe.rule=hash chooses experts without it"
    if model.param_dtype != "float32":
        # Half the spacing of numbers just below 1, where the scales begin.
        least = {"bfloat16": 2**-9, "float16": 2**-12}[model.param_dtype]
        parts["norm"] = (
            f"model.param_dtype={model.param_dtype} keeps no change of a scale of 1 below "
            f"{least:.2g}, which is more than a usual learning rate"
        )
    return parts
