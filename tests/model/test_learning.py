"""Every parameter has a gradient above rounding, or is named as not trained."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.base.errors import UserError
from moe_jax.config import DataConfig, ModelConfig, MoEConfig, OptimConfig, TrainConfig, train
from moe_jax.config.learning import not_trained
from moe_jax.config.presets import PRESETS
from moe_jax.model.parameters import dotted, role_of
from moe_jax.train.state import init_state
from moe_jax.train.step import make_gradient
from tests.conftest import GQA, MLA, SMALL_MODEL

NO_LOSSES = {
    "sequence_loss": 0.0,
    "expert_loss": 0.0,
    "device_loss": 0.0,
    "locality_loss": 0.0,
    "z_loss": 0.0,
}
"""Balance losses train the router, too. Without them a gradient is the text's."""
ROUNDING = 1e-6
"""Of the largest entry of all. A router of weights s/s had 1e-10 of it."""


def shrunk(model: ModelConfig) -> ModelConfig:
    """The same switches at the smallest sizes: one dense block if there are any, and one sparse."""
    attention = model.attention
    small = replace(
        attention,
        heads=4,
        kv_heads=4 if attention.kv_heads == attention.heads else 2,
        head_dim=8,
        q_rank=6 if attention.q_rank else 0,
        kv_rank=6,
        nope_dim=4,
        rope_dim=4,
        v_dim=4,
    )
    grouped = model.moe.groups > 1
    moe = replace(
        model.moe,
        experts=8 if grouped else 4,
        experts_per_token=2,
        expert_hidden=6,
        groups=4 if grouped else 1,
        groups_per_token=2 if grouped else 1,
        shared_experts=min(1, model.moe.shared_experts),
        **NO_LOSSES,
    )
    dense = min(1, model.dense_layers)
    return replace(
        model,
        width=16,
        dense_layers=dense,
        layers=dense + min(1, model.moe_layers),
        dense_hidden=12,
        attention=small,
        moe=moe,
        init_std=0.3,
        compute_dtype="float32",
        remat="none",
        unroll=1,
    )


def one_block(**moe) -> ModelConfig:
    """One sparse block, with a routing rule or a gate."""
    settings = {"experts": 6, "expert_hidden": 8, "rounding_tile": 8, **NO_LOSSES, **moe}
    own = MoEConfig(**settings)
    return replace(SMALL_MODEL, layers=1, dense_layers=0, init_std=0.3, moe=own)


SOFTMAX = {"gate": "softmax", "bias_rate": 0.0}
MODELS = {name: shrunk(preset.model) for name, preset in PRESETS.items()} | {
    "softmax": one_block(**SOFTMAX),
    "K = 1": one_block(experts_per_token=1, normalise=False),
    "K = 1 softmax": one_block(experts_per_token=1, normalise=False, **SOFTMAX),
    "K = 1 hash": one_block(experts_per_token=1, rule="hash", bias_rate=0.0),
    "K = 1 expert choice": one_block(
        experts_per_token=1, rule="expert_choice", allow_acausal=True, bias_rate=0.0
    ),
    "K = E": one_block(experts_per_token=6),
    "E = 1": one_block(experts=1, experts_per_token=1, normalise=False),
    "noisy_top_k": one_block(rule="noisy_top_k"),
    "token_rounding": one_block(rule="token_rounding"),
    "expert_choice": one_block(
        rule="expert_choice", allow_acausal=True, gate="softmax", bias_rate=0.0, normalise=False
    ),
    "hash": one_block(rule="hash", bias_rate=0.0),
    "capacity": one_block(capacity_factor=1.0),
    "fp8": one_block(precision="fp8"),
    "mla, deep prediction, no shared experts": replace(
        one_block(shared_experts=0), attention=MLA, mtp_depth=2, tied_embedding=False
    ),
    "dense": replace(SMALL_MODEL, layers=1, dense_layers=1, attention=GQA, init_std=0.3),
}
ALIKE = (
    "deepseek_v3",
    "mla, deep prediction, no shared experts",
    "deepseek_moe_16b",
    "qwen3_30b_a3b",
    "small",
    "softmax",
    "capacity",
    "fp8",
    "E = 1",
    "K = E",
    "K = 1 softmax",
    "K = 1 hash",
    "K = 1 expert choice",
)
"""Slow, because others have the same switches, each with one of these."""


def largest_gradients(model: ModelConfig) -> dict[str, np.ndarray]:
    """max |g| of every parameter, of each layer and expert by itself."""
    data = DataConfig(tokenizer="bytes", length=32)
    model = replace(model, vocabulary=None)
    config = TrainConfig(batch=4, model=model, data=data).resolved()
    state = jax.jit(lambda: init_state(config))()
    shape = (4, 33 + model.mtp_depth)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, 40)
    batch = {"tokens": tokens, "segments": jnp.ones_like(tokens)}
    _, gradient = jax.jit(make_gradient(config))(
        state.parameters, state.router, batch, jax.random.key(0)
    )
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    return {dotted(path): _largest(role_of(path), np.abs(leaf)) for path, leaf in leaves}


def _largest(role: str, sizes: np.ndarray) -> np.ndarray:
    if role in ("embedding", "head"):  # a row of the embedding whose token is absent has none
        return sizes.max(keepdims=True)
    return sizes.max(axis=-1 if sizes.ndim < 3 else (-2, -1))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in MODELS],
)
def test_every_parameter_learns_or_is_named(name):
    model = MODELS[name]
    found = largest_gradients(model)
    scale = max(values.max() for values in found.values())
    silent = {role_of(path) for path, values in found.items() if values.min() < ROUNDING * scale}
    assert silent == set(not_trained(model))


def test_the_router_of_one_normalised_expert_would_be_seen(monkeypatch):
    monkeypatch.setattr(train, "check_learning", lambda config: None)
    found = largest_gradients(one_block(experts_per_token=1))
    scale = max(values.max() for values in found.values())
    routers = [values for path, values in found.items() if role_of(path) == "router"]
    assert max(values.max() for values in routers) < ROUNDING * scale


def test_parts_that_are_not_trained_are_named():
    assert not_trained(MODELS["hash"]).keys() == {"router"}
    assert not_trained(replace(MODELS["dense"], param_dtype="bfloat16")).keys() == {"norm"}
    dense = replace(MODELS["hash"], layers=1, dense_layers=1)
    assert not not_trained(dense)


def run(model: ModelConfig = SMALL_MODEL, moe: MoEConfig | None = None, **settings) -> TrainConfig:
    model = replace(model, vocabulary=None, moe=moe or model.moe)
    return TrainConfig(model=model, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: run(moe=MoEConfig(experts_per_token=1)), "experts_per_token=1 with normalise"),
        (
            lambda: run(moe=MoEConfig(experts_per_token=1, rule="noisy_top_k", **SOFTMAX)),
            "set model.moe.normalise to false",
        ),
        (
            lambda: run(moe=MoEConfig(experts_per_token=1, rule="token_rounding")),
            "experts_per_token=1 with normalise",
        ),
        (
            lambda: run(moe=MoEConfig(experts=1, experts_per_token=1, normalise=False, **SOFTMAX)),
            "experts=1 with gate=softmax makes every score 1",
        ),
        (lambda: run(moe=MoEConfig(bias_until=0.0)), "set model.moe.bias_rate=0.001 to 0"),
        (
            lambda: run(replace(SMALL_MODEL, mtp_depth=2, mtp_weight=0.0)),
            "trains none of the mtp_depth=2 modules",
        ),
        (
            lambda: run(
                moe=MoEConfig(rule="token_rounding", rounding_tile=4096),
                optim=OptimConfig(accumulation=2),
            ),
            "rounds the mean load of 256 tokens an expert to 0",
        ),
    ],
)
def test_settings_that_switch_learning_off_are_one_line(make, message):
    with pytest.raises(UserError) as refused:
        make()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_same_settings_are_allowed_where_nothing_is_switched_off():
    """Without sparse blocks, and with the smallest change that the line asks for."""
    one = MoEConfig(experts_per_token=1)
    run(replace(SMALL_MODEL, dense_layers=SMALL_MODEL.layers), moe=one)
    run(moe=replace(one, normalise=False))
    run(moe=MoEConfig(bias_until=0.0, bias_rate=0.0))
