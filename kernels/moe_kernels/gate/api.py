"""gate: a token's experts and their weights, with the gradient of the weights in closed form."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, ShapeDtypeStruct
from jaxtyping import Float, Int

from moe_kernels.gate import reference
from moe_kernels.gate.shapes import FUNCTIONS, Choice, tile
from moe_kernels.launch import launch, power_of_two, require


class Gate(NamedTuple):
    """A routing decision."""

    experts: Int[Array, "T K"]
    """Chosen experts, best first, distinct."""
    weights: Float[Array, "T K"]
    """Factors on their outputs (float32)."""
    scores: Float[Array, "T E"]
    """Affinities before any bias (float32)."""


def gate(logits: Float[Array, "T E"], bias: Float[Array, "E"] | None, choice: Choice) -> Gate:
    """The exact top-k gate (softmax, or DeepSeek-V3's: arXiv:2412.19437, eq. 12-16).

    s = softmax(logits) or sigmoid(logits); the K largest of s + bias are chosen, from the
    groups_per_token groups with the largest sums of their `representatives` best of s + bias;
    weight = scale · s, divided by its sum over the chosen if `normalise`. All in float32. The lower
    index wins a tie, as in jax.lax.top_k. A NaN, of either sign, counts as the largest: it is
    chosen, and the token's weights are NaN.

    Gradients reach the logits from weights and scores; none reaches the bias or passes through the
    choice. Raises UnavailableError where kernels cannot run, ValueError for what does not fit.
    """
    require()
    _check(logits, bias, choice)
    if not len(logits):
        return Gate(*reference.gate(logits, bias, choice))
    return _gate(logits.astype(jnp.float32), bias, choice)


def _check(logits: Array, bias: Array | None, choice: Choice) -> None:
    """One line that names what does not fit."""
    experts = logits.shape[-1]
    if logits.ndim != 2 or (bias is not None and bias.shape != (experts,)):
        of_bias = None if bias is None else bias.shape
        raise ValueError(f"logits {logits.shape} and bias {of_bias} do not fit [T, E] and [E]")
    if choice.function not in FUNCTIONS:
        raise ValueError(f"function {choice.function!r}: the gate has {' and '.join(FUNCTIONS)}")
    if experts % choice.groups or not 1 <= choice.groups_per_token <= choice.groups:
        raise ValueError(
            f"{choice.groups_per_token} of {choice.groups} groups do not fit {experts} experts"
        )
    reachable = experts // choice.groups * choice.groups_per_token
    if not 1 <= choice.per_token <= reachable or choice.representatives < 1:
        raise ValueError(
            f"{choice.per_token} experts a token, of {reachable} in the groups that it may use, "
            f"by {choice.representatives} representatives: each must be at least 1, and the first "
            "not above the second"
        )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gate(logits: Array, bias: Array | None, choice: Choice) -> Gate:
    return _launch(logits, bias, choice)


def _save(logits: Array, bias: Array | None, choice: Choice) -> tuple[Gate, tuple[Array, Array]]:
    found = _launch(logits, bias, choice)
    return found, (found.scores, found.experts)


def _backward(choice: Choice, saved: tuple[Array, Array], cotangents: Gate) -> tuple[Array, None]:
    """In jnp: XLA makes one pass over [T, E] of it, as a kernel would be."""
    scores, experts = saved
    d_chosen = choice.scale * cotangents.weights
    if choice.normalise:
        chosen = jnp.take_along_axis(scores, experts, axis=1)
        total = jnp.sum(chosen, axis=1, keepdims=True) + 1e-20
        mean = jnp.sum(d_chosen * chosen, axis=1, keepdims=True) / total
        d_chosen = (d_chosen - mean) / total
    picked = experts[:, :, None] == jnp.arange(scores.shape[1])
    d_scores = cotangents.scores + jnp.sum(jnp.where(picked, d_chosen[:, :, None], 0.0), axis=1)
    if choice.function == "sigmoid":
        return d_scores * scores * (1 - scores), None
    return scores * (d_scores - jnp.sum(scores * d_scores, axis=1, keepdims=True)), None


_gate.defvjp(_save, _backward)


def _launch(logits: Array, bias: Array | None, choice: Choice) -> Gate:
    from moe_kernels.gate.kernel import gate_kernel

    (tokens, experts), per_token = logits.shape, choice.per_token
    limited = choice.groups_per_token < choice.groups
    groups = choice.groups if limited else 1
    held = tile(tokens, experts, groups)
    found = launch(
        gate_kernel,
        (logits, logits if bias is None else bias.astype(jnp.float32)),
        (
            ShapeDtypeStruct((tokens, per_token), jnp.int32),
            ShapeDtypeStruct((tokens, per_token), jnp.float32),
            ShapeDtypeStruct((tokens, experts), jnp.float32),
        ),
        (-(-tokens // held.tokens),),
        held.tuning,
        T=tokens,
        E=experts,
        K=per_token,
        G=groups,
        KEPT=choice.groups_per_token if limited else 1,
        BEST=min(choice.representatives, experts // groups),
        SIGMOID=choice.function == "sigmoid",
        BIASED=bias is not None,
        NORMALISE=choice.normalise,
        SCALE=float(choice.scale),
        BT=held.tokens,
        BG=held.groups,
        BS=held.size,
        SLOTS=power_of_two(per_token),
    )
    return Gate(*found)
