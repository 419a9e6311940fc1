"""Parameters and floating-point operations of a model, counted without allocating it."""

from typing import NamedTuple

from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model.abstract import abstract_states
from moe_jax.model.parameters import role_of


class Counts(NamedTuple):
    """Numbers of parameters.

    `total` and `active` are the main model's. Multi-token prediction is counted by itself, as in
    the published figures.
    """

    total: int
    active: int
    """Parameters that one token uses: K of E routed experts, and all others."""
    embedding: int
    """The embedding table (part of `total` and of `active`)."""
    mtp: int
    """Parameters of the multi-token-prediction modules, shared tables excluded."""
    mtp_active: int
    """Parameters of the multi-token-prediction modules that one token uses."""


def count_parameters(config: ModelConfig) -> Counts:
    """Counts by building the abstract model, which allocates nothing."""
    assert config.vocabulary is not None, "use TrainConfig.resolved()"
    parameters, _ = abstract_states(config)
    # The router biases are left out: they are no trained parameters.
    whole = {"main": 0, "mtp": 0}
    routed = {"main": 0, "mtp": 0}
    for path, leaf in nnx.to_flat_state(parameters):
        part = "mtp" if path[0] == "mtp" else "main"
        whole[part] += leaf.size
        if role_of(path) == "expert":
            routed[part] += leaf.size
    # The parameters of the E - K experts that a token does not use.
    idle = {
        part: size - size * config.moe.experts_per_token // config.moe.experts
        for part, size in routed.items()
    }
    return Counts(
        total=whole["main"],
        active=whole["main"] - idle["main"],
        embedding=config.vocabulary * config.width,
        mtp=whole["mtp"],
        mtp_active=whole["mtp"] - idle["mtp"],
    )


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Model FLOPs of the forward and the backward pass for one token.

    6 · (parameters of active matrix products), and 6 · L · H · (A + C) / 2 a layer for causal
    attention (arXiv:2204.02311, appendix B, without the masked half). A is the width of a query, C
    that of a value. Rematerialisation, padding and look-ups do not count. Documents shorter than L
    need less attention, which is not deducted.
    """
    counts = count_parameters(config)
    # An untied embedding is only looked up. A tied one is the head, too, so its product counts.
    look_up = 0 if config.tied_embedding else counts.embedding
    # Every prediction depth multiplies by the main model's head once more.
    heads = config.mtp_depth * counts.embedding
    products = counts.active - look_up + counts.mtp_active + heads
    attention = config.attention
    if attention.kind == "gqa":
        widths = 2 * attention.head_dim
    else:
        widths = attention.nope_dim + attention.rope_dim + attention.v_dim
    layers = config.layers + config.mtp_depth
    # 6: a multiplication and an addition, in one forward and two backward products.
    return 6.0 * products + layers * 6.0 * length * attention.heads * widths / 2
