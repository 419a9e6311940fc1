"""The optax chain: clip -> AdamW or Muon, under a warm-up schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from moe_jax.config import OptimConfig

NEVER_DECAYED = ("scale", "embedding")
ALWAYS_ADAM = ("scale", "embedding", "head", "router", "router_noise")


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine decay to `final`, or constant and a linear decay (WSD)."""
    peak, end = config.learning_rate, config.learning_rate * config.final
    warmup = round(config.warmup * steps)
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.final)
        return optax.join_schedules([rise, after], [warmup]) if warmup else after
    decay = round(config.decay * steps)
    fall = optax.linear_schedule(peak, end, max(decay, 1))
    stable = optax.constant_schedule(peak)
    return optax.join_schedules([rise, stable, fall], [warmup, steps - decay])


def _names(path: tuple[Any, ...]) -> set[str]:
    return {str(getattr(entry, "key", entry)) for entry in path}


def _is_matrix(path: tuple[Any, ...], exceptions: tuple[str, ...]) -> bool:
    return not _names(path) & set(exceptions)


def decay_mask(parameters: Any) -> Any:
    """True where weight decay applies: every matrix but the embedding; no norm scale."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _is_matrix(path, NEVER_DECAYED), parameters
    )


def muon_dimensions(parameters: Any) -> Any:
    """Muon orthogonalises the last two axes of hidden matrices, each layer and expert by itself;
    embedding, head, router and norms are left to Adam (arXiv:2502.16982)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
            if _is_matrix(path, ALWAYS_ADAM)
            else None
        ),
        parameters,
    )


def make_optimizer(
    config: OptimConfig, steps: int, *, clip: bool = True
) -> optax.GradientTransformation:
    """Clips by global norm, then applies the configured rule with decoupled weight decay.

    Without `clip` the caller clips (`clipped`), because it has the gradient in parts; the
    optimizer's state has the same form.

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
    limit = config.clip_norm if clip else 0.0
    first = optax.clip_by_global_norm(limit) if limit else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask)
    rate = optax.scale_by_learning_rate(learning_rate(config, steps))
    return optax.chain(first, direction, decay, rate)


def clipped(gradients: Any, norm: jax.Array, limit: float) -> Any:
    """What optax.clip_by_global_norm(limit) makes of a part of a gradient whose norm, over all
    parts, is `norm`; 0 does not clip."""
    if not limit:
        return gradients
    return jax.tree.map(
        lambda g: jnp.where(norm < limit, g, g / norm.astype(g.dtype) * limit), gradients
    )
