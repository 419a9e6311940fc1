"""Step 1: which experts a token goes to, and with what weight."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int
from moe_kernels.gate import GateConfig, gate

from moe_jax.config import MoEConfig
from moe_jax.moe.rules import (
    EXPERTS_CHOOSE,
    NO_CONTEXT,
    RULES,
    RoutingContext,
    representatives,
)
from moe_jax.parallel.mesh import gather_rows, own_draw, own_rows

KERNEL_RULES = ("top_k", "noisy_top_k")
"""Rules that the gate kernel computes. The others look at many tokens at once, or at none."""


class Routing(NamedTuple):
    """A routing decision, with what the balance losses need."""

    experts: Int[Array, "T K"]
    """Chosen experts, best first, distinct within a token. E stands for no expert."""
    weights: Float[Array, "T K"]
    """Factors on the chosen experts' outputs, float32. 0 for no expert."""
    scores: Float[Array, "T E"]
    """Affinities before any bias: softmax or sigmoid of the logits, float32."""
    logits: Float[Array, "T E"]
    """Router outputs, with their noise if there is any (float32)."""


def route(
    logits: Float[Array, "T E"],
    bias: Float[Array, "E"],
    config: MoEConfig,
    context: RoutingContext = NO_CONTEXT,
    spread: Float[Array, "T E"] | None = None,
    kernels: bool = False,
) -> Routing:
    """Applies the configured gate and rule. NaN logits give NaN weights.

    softmax: s = softmax(logits) chooses experts and gives their weights. Rules that compare a
    token's own experts compare the logits, which have the same order. sigmoid: s + bias chooses,
    and s gives the weights (arXiv:2412.19437, eq. 12-16). `spread` is the output of noisy top-k's
    second router. With `kernels` one Triton kernel computes the KERNEL_RULES. Tokens of no document
    (context.documents) have no expert.
    """
    logits = logits.astype(jnp.float32)
    if spread is not None and context.key is not None:
        noise = context.noise
        if noise is None:
            noise = own_draw(partial(jax.random.normal, context.key), logits.shape)
        logits = add_noise(logits, spread, noise.reshape(logits.shape))
    if context.counted is not None:
        # 0: not even a NaN at a token that does not count reaches the others' gradients.
        logits = jnp.where(context.counted[:, None], logits, 0.0)
    if kernels and config.rule in KERNEL_RULES:
        gated = gate(logits, bias if config.gate == "sigmoid" else None, kernel_choice(config))
        routing = Routing(*gated, logits)
    else:
        routing = _route_in_xla(logits, bias, config, context)
    return routing if context.counted is None else _to_no_expert(routing, ~context.counted)


def _route_in_xla(
    logits: Float[Array, "T E"], bias: Float[Array, "E"], config: MoEConfig, context: RoutingContext
) -> Routing:
    """route without Triton, for logits that have their noise."""
    if config.gate == "softmax":
        scores = selection = jax.nn.softmax(logits, axis=-1)
        # As the kernel: logits have the same order, and stay exact whatever exp rounds to.
        if config.rule in KERNEL_RULES and kernel_choice(config).chooses_by_logits(biased=False):
            selection = logits
    else:
        scores = jax.nn.sigmoid(logits)
        selection = scores + bias
    # A NaN of either sign is the largest, so that it shows; lax.top_k puts -NaN last.
    selection = jnp.where(jnp.isnan(selection), jnp.nan, selection)
    if context.counted is not None:
        # Under rules by which experts choose, a token that does not count takes nobody's place.
        selection = jnp.where(context.counted[:, None], selection, -jnp.inf)
    experts = _choose(lax.stop_gradient(selection), config, context)
    # A hash looks at no score, so its experts weigh the same: scale / K each.
    if config.rule == "hash":
        weights = jnp.full_like(scores, config.scale / experts.shape[1], shape=experts.shape)
    else:
        weights = gate_weights(scores, experts, config.normalise, config.scale)
    return Routing(experts, weights, scores, logits)


def _choose(
    selection: Float[Array, "T E"], config: MoEConfig, context: RoutingContext
) -> Int[Array, "T K"]:
    """The rule's choice for this device's tokens."""
    rule = RULES[config.rule]
    if config.rule not in EXPERTS_CHOOSE:
        return rule(selection, config, context)
    # An expert compares the tokens of all devices.
    documents = gather_rows(context.documents)
    return own_rows(rule(gather_rows(selection), config, context._replace(documents=documents)))


def _to_no_expert(routing: Routing, which: Bool[Array, "T"]) -> Routing:
    """The routing with some tokens' experts taken away."""
    number = routing.scores.shape[1]
    return routing._replace(
        experts=jnp.where(which[:, None], number, routing.experts),
        weights=jnp.where(which[:, None], 0.0, routing.weights),
    )


def kernel_choice(config: MoEConfig) -> GateConfig:
    """The configured gate as the kernel's own configuration. Kernels know nothing of moe_jax."""
    return GateConfig(
        per_token=config.experts_per_token,
        function=config.gate,
        normalise=config.normalise,
        scale=config.scale,
        groups=config.groups,
        groups_per_token=config.groups_per_token,
        representatives=representatives(config),
    )


def gate_weights(
    scores: Float[Array, "T E"], experts: Int[Array, "T K"], normalise: bool, scale: float
) -> Float[Array, "T K"]:
    """scale · s[t, e_k], divided by its sum over k if `normalise` (arXiv:2412.19437, eq. 13).

    The router bias is not part of `scores`. It decides which experts are chosen, and never how much
    they count.
    """
    # clip, and then 0: an expert of number E is none.
    chosen = jnp.take_along_axis(scores, experts, axis=-1, mode="clip")
    chosen = jnp.where(experts < scores.shape[1], chosen, 0.0)
    if normalise:
        # 1e-20 guards tokens without any expert: 0 / 0 would reach the gradient.
        chosen = chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)
    return scale * chosen


def add_noise(
    logits: Float[Array, "T E"], spread: Float[Array, "T E"], noise: Float[Array, "T E"]
) -> Float[Array, "T E"]:
    """logits + N(0, 1) · softplus(spread) (noisy top-k gating, arXiv:1701.06538, eq. 4)."""
    return logits + noise * jax.nn.softplus(spread)
