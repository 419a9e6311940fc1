"""Generative adversarial distillation from a teacher's text alone (arXiv:2511.10643).

A discriminator learns to score the teacher's continuation of a prompt above the student's. Its
score is the student's reward in a policy gradient, relative to the other continuations of the same
prompt. The discriminator keeps training, so the reward follows the student.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from moe_jax.base.initial import named_key, root_key
from moe_jax.config import ModelConfig
from moe_jax.model.abstract import split_model
from moe_jax.model.linear import Linear
from moe_jax.model.transformer import Transformer


class Discriminator(nnx.Module):
    """A transformer whose mean last hidden state gives one score for each sequence.

    The mean is over the tokens of documents: those whose segment is not 0.
    """

    def __init__(self, config: ModelConfig, *, key: Array) -> None:
        self.trunk = Transformer(config, key=named_key(key, "trunk"))
        dtype = jnp.dtype(config.param_dtype)
        own = named_key(key, "head")
        self.head = Linear(config.width, 1, std=config.init_std, dtype=dtype, key=own)

    def __call__(
        self, tokens: Int[Array, "B L"], segments: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B"]:
        """Scores of whole sequences, prompt and continuation.

        Without `segments`, no token is padding.
        """
        if segments is None:
            segments = jnp.ones_like(tokens)
        hidden, _ = self.trunk.hidden(tokens, segments)
        counted = (segments != 0)[..., None]
        states = jnp.where(counted, self.trunk.norm(hidden), 0)
        mean = states.sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1).astype(states.dtype)
        return self.head(mean)[:, 0].astype(jnp.float32)


def make_discriminator(
    config: ModelConfig, parameters: Any, router: Any, seed: int
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graph, parameters, router) of a discriminator whose trunk is a copy of a trained model."""
    built = Discriminator(config, key=root_key(seed))
    graph, fresh, bias = split_model(built)
    for state, trained in ((fresh, parameters), (bias, router)):
        pure = nnx.to_pure_dict(state)
        if "trunk" in pure:
            pure["trunk"] = jax.tree.map(jnp.copy, nnx.to_pure_dict(trained))
            nnx.replace_by_pure_dict(state, pure)
    return graph, fresh, bias


def discriminator_loss(teacher: Float[Array, "N"], student: Float[Array, "N"]) -> Float[Array, ""]:
    """mean of -log sigmoid(D(y_teacher) - D(y_student)), pairs with the same prompt."""
    return jnp.mean(jax.nn.softplus(student - teacher))


def accuracy(teacher: Float[Array, "N"], student: Float[Array, "N"]) -> Float[Array, ""]:
    """Share of pairs in which the teacher's text scores higher. A tie counts half.

    At 0.5 the discriminator cannot tell the two apart, or it has collapsed. At 1 no useful reward
    is left.
    """
    return jnp.mean(jnp.where(teacher == student, 0.5, teacher > student))


def group_advantage(
    rewards: Float[Array, "prompts n"], epsilon: float = 1e-6
) -> Float[Array, "prompts n"]:
    """(r - mean) / (std + epsilon) over the n continuations of a prompt (GRPO, arXiv:2402.03300).

    The mean is the policy gradient's baseline. It contains the continuation's own reward, which
    only scales the gradient by (n - 1)/n.
    """
    mean = rewards.mean(-1, keepdims=True)
    std = rewards.std(-1, keepdims=True)
    return (rewards - mean) / (std + epsilon)


def policy_loss(
    log_q: Float[Array, "B L"],
    old_log_q: Float[Array, "B L"],
    advantage: Float[Array, "B"],
    mask: Bool[Array, "B L"],
    clip: float = 0.2,
) -> Float[Array, ""]:
    """- mean over sequences of mean over written tokens of min(r A, clip(r, 1 ± c) A),
    r = q / q_old (PPO, arXiv:1707.06347, eq. 7, with the advantage of the whole sequence).

    On the first update after sampling, r = 1 and the gradient is REINFORCE's, -A · grad log q.
    Positions that the mask leaves out have no part in it, not even as NaN.
    """
    change = jnp.where(mask, log_q - lax.stop_gradient(old_log_q), 0.0)
    ratio = jnp.exp(change)
    gain = lax.stop_gradient(advantage)[:, None]
    surrogate = jnp.minimum(ratio * gain, jnp.clip(ratio, 1 - clip, 1 + clip) * gain)
    return -jnp.mean(sequence_means(surrogate, mask))


def sequence_means(values: Float[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B"]:
    """The mean of each sequence's values where the mask is true. 0 where it is nowhere."""
    return jnp.where(mask, values, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def distinct(tokens: Int[Array, "B L"], order: int) -> float:
    """Distinct n-grams / all n-grams of the sequences (arXiv:1510.03055). Near 0 is mode collapse.

    The ratio falls with the amount of text, so compare equal amounts only.
    """
    rows = [tuple(row) for row in jax.device_get(tokens).tolist()]
    grams = [row[i : i + order] for row in rows for i in range(len(row) - order + 1)]
    return len(set(grams)) / max(len(grams), 1)
