"""gate: a token's experts and their weights, with the gradient of the weights in closed form."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jaxtyping import Float, Int

from moe_kernels.gate import reference
from moe_kernels.gate.config import FUNCTIONS, GateConfig
from moe_kernels.gate.shapes import gate_tile
from moe_kernels.launch import launch, next_power_of_two, require_triton


class GateOutput(NamedTuple):
    """The routing of T tokens."""

    experts: Int[Array, "T K"]
    """Chosen experts, best first, distinct."""
    weights: Float[Array, "T K"]
    """Factors on their outputs (float32)."""
    scores: Float[Array, "T E"]
    """Scores before any bias (float32)."""


def gate(
    logits: Float[Array, "T E"], bias: Float[Array, "E"] | None, config: GateConfig
) -> GateOutput:
    """The exact top-k gate: softmax, or DeepSeek-V3's (arXiv:2412.19437, eq. 12-16).

    s = softmax(logits) or sigmoid(logits). The K largest of s + bias are chosen, from the
    groups_per_token groups with the largest sums of their `representatives` best of s + bias.
    weight = scale · s, divided by the sum of s over the chosen if `normalise`. All in float32.

    Without a bias the logits choose, which have the same order as the scores. So the choice is
    exact on every device. With a bias s + bias chooses: on a GPU two experts whose sums differ by
    one unit in the last place may change places.

    The lower index wins a tie, as in jax.lax.top_k. A NaN of either sign counts as the largest: it
    is chosen, and the token's weights are NaN.

    Gradients reach the logits from weights and scores. None reaches the bias, and none passes
    through the selection. Raises UnavailableError where kernels cannot run, and ValueError for
    shapes or settings that do not fit.
    """
    require_triton()
    _check(logits, bias, config)
    if not len(logits):  # a grid of no programs cannot be launched
        return GateOutput(*reference.gate(logits, bias, config))
    return _gate(logits.astype(jnp.float32), bias, config)


def _check(logits: Array, bias: Array | None, config: GateConfig) -> None:
    """Raises ValueError with one line that names what does not fit."""
    experts = logits.shape[-1]
    if logits.ndim != 2 or (bias is not None and bias.shape != (experts,)):
        bias_shape = None if bias is None else bias.shape
        raise ValueError(f"logits {logits.shape} and bias {bias_shape} do not fit [T, E] and [E]")
    if config.function not in FUNCTIONS:
        raise ValueError(f"function {config.function!r}: the gate has {' and '.join(FUNCTIONS)}")
    if experts % config.groups or not 1 <= config.groups_per_token <= config.groups:
        raise ValueError(
            f"{config.groups_per_token} of {config.groups} groups do not fit {experts} experts"
        )
    reachable = experts // config.groups * config.groups_per_token
    if not 1 <= config.per_token <= reachable or config.representatives < 1:
        raise ValueError(
            f"{config.per_token} experts a token, of {reachable} in the groups that it may use, "
            f"by {config.representatives} representatives: each must be at least 1, and the first "
            "not above the second"
        )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gate(logits: Array, bias: Array | None, config: GateConfig) -> GateOutput:
    return _launch(logits, bias, config)


def _save(
    logits: Array, bias: Array | None, config: GateConfig
) -> tuple[GateOutput, tuple[Array, Array]]:
    output = _launch(logits, bias, config)
    return output, (output.scores, output.experts)


def _backward(
    config: GateConfig, saved: tuple[Array, Array], cotangents: GateOutput
) -> tuple[Array, None]:
    """The gradient of the logits, from the saved scores [T, E] and experts [T, K].

    It is in jnp, because XLA makes one pass over [T, E] of it, as a kernel would.
    """
    scores, experts = saved
    d_chosen = config.scale * cotangents.weights
    if config.normalise:
        # w_k = s_k / sum(s): dw_k reaches every chosen s, less the weighted mean of all dw.
        chosen = jnp.take_along_axis(scores, experts, axis=1)
        total = jnp.sum(chosen, axis=1, keepdims=True) + 1e-20
        mean = jnp.sum(d_chosen * chosen, axis=1, keepdims=True) / total
        d_chosen = (d_chosen - mean) / total
    # A comparison and a sum over K instead of a scatter, which XLA would run with atomics on GPUs.
    is_chosen = experts[:, :, None] == jnp.arange(scores.shape[1])  # [T, K, E], fused away
    d_scores = cotangents.scores + jnp.sum(jnp.where(is_chosen, d_chosen[:, :, None], 0.0), axis=1)
    if config.function == "sigmoid":
        return d_scores * scores * (1 - scores), None
    return scores * (d_scores - jnp.sum(scores * d_scores, axis=1, keepdims=True)), None


_gate.defvjp(_save, _backward)


def _launch(logits: Array, bias: Array | None, config: GateConfig) -> GateOutput:
    # Kernels are imported where they are launched: triton has wheels for Linux only.
    from moe_kernels.gate.kernel import gate_kernel

    tokens, experts = logits.shape
    per_token = config.per_token
    # Where a token may use all groups, they restrict nothing: one group, and no code for it.
    limited = config.groups_per_token < config.groups
    groups = config.groups if limited else 1
    tile = gate_tile(tokens, experts, groups)
    outputs = launch(
        gate_kernel,
        # A kernel has no optional pointers: without a bias any array stands there, never read.
        (logits, logits if bias is None else bias.astype(jnp.float32)),
        (
            ShapeDtypeStruct((tokens, per_token), jnp.int32),
            ShapeDtypeStruct((tokens, per_token), jnp.float32),
            ShapeDtypeStruct((tokens, experts), jnp.float32),
        ),
        (-(-tokens // tile.tokens),),
        tile.tuning,
        T=tokens,
        E=experts,
        K=per_token,
        G=groups,
        KEPT=config.groups_per_token if limited else 1,
        BEST=min(config.representatives, experts // groups),
        SIGMOID=config.function == "sigmoid",
        BIASED=bias is not None,
        BY_LOGITS=config.chooses_by_logits(bias is not None),
        NORMALISE=config.normalise,
        SCALE=float(config.scale),
        BT=tile.tokens,
        BG=tile.groups,
        BS=tile.size,
        SLOTS=next_power_of_two(per_token),
    )
    return GateOutput(*outputs)
