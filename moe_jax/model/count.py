"""Parameters and floating-point operations of a model, counted without allocating it."""

from typing import NamedTuple

from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model.abstract import abstract_states
from moe_jax.model.parameters import role_of


class Counts(NamedTuple):
    """Numbers of parameters. `total` and `active` are the main model's: multi-token prediction
    stands apart, as in the published figures."""

    total: int
    active: int
    """Those a token meets: K of E routed experts, everything else whole."""
    embedding: int
    """The embedding table (part of `total` and of `active`)."""
    mtp: int
    """Parameters of the multi-token-prediction modules, shared tables excluded."""
    mtp_active: int


def count_parameters(config: ModelConfig) -> Counts:
    """Counts by building the model under eval_shape: no memory, a second for 671B."""
    assert config.vocabulary is not None
    parameters, _ = abstract_states(config)
    whole = {"main": 0, "mtp": 0}
    routed = {"main": 0, "mtp": 0}
    for path, leaf in nnx.to_flat_state(parameters):
        part = "mtp" if path[0] == "mtp" else "main"
        whole[part] += leaf.size
        if role_of(path) == "expert":
            routed[part] += leaf.size
    idle = {
        k: n - n * config.moe.experts_per_token // config.moe.experts for k, n in routed.items()
    }
    return Counts(
        total=whole["main"],
        active=whole["main"] - idle["main"],
        embedding=config.vocabulary * config.width,
        mtp=whole["mtp"],
        mtp_active=whole["mtp"] - idle["mtp"],
    )


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Model FLOPs of forward and backward for one token: 6 for each parameter of an active matrix
    product plus 6 · L · H · (A + C) / 2 a layer for causal attention (arXiv:2204.02311, appendix
    B, with the masked half left out). Rematerialisation, padding and look-ups do not count.

    Documents shorter than L need less attention than this; that is not deducted.
    """
    counts = count_parameters(config)
    look_up = 0 if config.tied_embedding else counts.embedding
    heads = config.mtp_depth * counts.embedding
    products = counts.active - look_up + counts.mtp_active + heads
    c = config.attention
    widths = 2 * c.head_dim if c.kind == "gqa" else c.nope_dim + c.rope_dim + c.v_dim
    layers = config.layers + config.mtp_depth
    return 6.0 * products + layers * 6.0 * length * c.heads * widths / 2
