"""The optax chain: AdamW or Muon -> weight decay -> learning rate. Clipping is `clipped`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from moe_jax.config import OptimConfig
from moe_jax.model.parameters import Role, role_of

NEVER_DECAYED: tuple[Role, ...] = ("norm", "embedding")
ALWAYS_ADAM: tuple[Role, ...] = ("norm", "embedding", "head", "router", "router_noise")
"""Muon is for hidden matrices. These roles are updated by its own Adam (arXiv:2502.16982)."""


def learning_rate(config: OptimConfig, steps: int, continue_to: int = 0) -> optax.Schedule:
    """Linear warm-up, then a cosine decay, a constant and a linear decay (WSD), or a constant.

    Update n, from 0, of a warm-up of W updates has (n + 1) / (W + 1) of the peak: the first one
    learns already. The decays end at `final` times the peak. Warm-up and decay are fractions of
    `steps`. With `continue_to` the updates after `steps` have a warm-up and a decay of their own,
    fractions of continue_to - steps. That warm-up rises from where the learning rate stood. A
    constant stays.
    """
    first = _phase(config, steps, begin=0.0)
    if not continue_to:
        return first
    decayed = config.schedule == "cosine" or not config.is_at_peak(steps, steps)
    stood = config.learning_rate * (config.final if decayed else 1.0)
    second = _phase(config, continue_to - steps, begin=stood)
    return optax.join_schedules([first, second], [steps])


def _phase(config: OptimConfig, steps: int, begin: float) -> optax.Schedule:
    """The learning rate of `steps` updates. Its warm-up rises from `begin`."""
    peak = config.learning_rate
    end = peak * config.final
    warmup = round(config.warmup * steps)
    rise = optax.linear_schedule(begin + (peak - begin) / (warmup + 1), peak, max(warmup, 1))
    if config.schedule == "cosine":
        # At least 1, because optax refuses schedules of no steps.
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final)
        return optax.join_schedules([rise, after], [warmup]) if warmup else after
    stable = optax.constant_schedule(peak)
    if config.schedule == "constant":
        return optax.join_schedules([rise, stable], [warmup]) if warmup else stable
    decay = round(config.decay * steps)
    fall = optax.linear_schedule(peak, end, max(decay, 1))
    return optax.join_schedules([rise, stable, fall], [warmup, steps - decay])


def decay_mask(parameters: Any) -> Any:
    """True where weight decay applies: every matrix but the embedding, and no norm scale."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: role_of(path) not in NEVER_DECAYED, parameters
    )


def muon_dimensions(parameters: Any) -> Any:
    """Muon orthogonalises the last two axes of hidden matrices, each layer and expert by itself.
    Embedding, head, router and norms are left to Adam (arXiv:2502.16982)."""

    def dimensions(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        if role_of(path) in ALWAYS_ADAM:
            return None
        return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(dimensions, parameters)


def make_optimizer(
    config: OptimConfig, steps: int, continue_to: int = 0
) -> optax.GradientTransformation:
    """The configured rule with decoupled weight decay. It takes a gradient that is `clipped`.

    Muon's updates are rescaled to Adam's root mean square (0.2), so that one learning rate and one
    decay serve both kinds of parameter.
    """
    if config.optimizer == "adamw":
        direction = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    else:
        # At a learning rate of -1 it gives the bare direction; its own decay would reach norms.
        direction = muon(
            -1.0,
            eps=config.epsilon,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
        )
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    rate = optax.scale_by_learning_rate(learning_rate(config, steps, continue_to))
    return optax.chain(direction, decay, rate)


def clipped(gradients: Any, norm: jax.Array, limit: float) -> Any:
    """g · min(1, limit / norm), as optax.clip_by_global_norm. A limit of 0 does not clip.

    `norm` is an argument, because the caller may have only a part of the gradient.
    """
    if not limit:
        return gradients
    # Division first, as optax does it: the same bits.
    return jax.tree.map(
        lambda g: jnp.where(norm < limit, g, g / norm.astype(g.dtype) * limit), gradients
    )
