"""Divergences between a teacher p and a student q, each a sum over the vocabulary of one term.

A term takes (log p, log q) of some tokens and gives their share of the divergence. It is
elementwise, so it can be summed in chunks of the vocabulary (chunked.py). Its derivative in log q,
w, gives the gradient in the student's logits: w - q · sum(w).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from moe_jax.config.distill import DivergenceKind, check_divergence

Entries = Float[Array, "*batch V"]


class Divergence(NamedTuple):
    """Which divergence. `mix` is the b of jsd or the l of the skewed ones; others ignore it."""

    kind: DivergenceKind = "forward"
    mix: float = 0.5

    def checked(self) -> "Divergence":
        """Itself. UserError: unknown kind, or `mix` outside its range."""
        check_divergence(self.kind, self.mix)
        return self

    def term(self, log_p: Entries, log_q: Entries) -> Entries:
        """Every entry's share of the divergence."""
        return TERMS[self.kind](log_p, log_q, self.mix)


def _forward(log_p: Entries, log_q: Entries, mix: float) -> Entries:
    """KL(p ‖ q) = sum p log(p/q), which covers every mode of the teacher."""
    return jnp.exp(log_p) * (log_p - log_q)


def _reverse(log_p: Entries, log_q: Entries, mix: float) -> Entries:
    """KL(q ‖ p), which seeks one mode."""
    return _forward(log_q, log_p, mix)


def _jsd(log_p: Entries, log_q: Entries, mix: float) -> Entries:
    """(b KL(p ‖ m) + (1-b) KL(q ‖ m)) / (b (1-b)), m = b p + (1-b) q (arXiv:2306.13649, eq. 1).

    The paper has no denominator. It makes the divergence continuous: KL(p ‖ q) at b = 0 and
    KL(q ‖ p) at b = 1, where the unscaled divergence and its gradient vanish.
    """
    # Near the ends a small difference is divided by a small b, which float32 alone would lose.
    # Hence the terms are x log(x/m) - x + m, which add up to the same because p, q and m each sum
    # to 1, and _log_mixture gives log(m/x) accurately where m is near x.
    if mix == 0:
        return _forward(log_p, log_q, mix)
    if mix == 1:
        return _reverse(log_p, log_q, mix)
    p = jnp.exp(log_p)
    q = jnp.exp(log_q)
    from_p = (1 - mix) * (q - p) - p * _log_mixture(log_q - log_p, 1 - mix)
    from_q = mix * (p - q) - q * _log_mixture(log_p - log_q, mix)
    return from_p / (1 - mix) + from_q / mix


def _log_mixture(ratio: Entries, weight: float) -> Entries:
    """log(weight · e^ratio + 1 - weight), also exact to float32 for a small weight."""
    if weight > 0.5:
        return jnp.logaddexp(jnp.log(weight) + ratio, jnp.log1p(-weight))
    # Above 60 the probability that multiplies this logarithm is below e^-60, and e^ratio would
    # overflow from 89 on.
    return jnp.log1p(weight * jnp.expm1(jnp.minimum(ratio, 60.0)))


def _skew_forward(log_p: Entries, log_q: Entries, mix: float) -> Entries:
    """KL(p ‖ l p + (1-l) q), whose gradient is bounded by 1/l (arXiv:2402.03898, eq. 4)."""
    return -jnp.exp(log_p) * _log_skew(log_q - log_p, mix)


def _skew_reverse(log_p: Entries, log_q: Entries, mix: float) -> Entries:
    """KL(q ‖ l q + (1-l) p) (arXiv:2402.03898, eq. 5)."""
    return _skew_forward(log_q, log_p, mix)


def _log_skew(ratio: Entries, mix: float) -> Entries:
    return jnp.logaddexp(jnp.log(mix), jnp.log1p(-mix) + ratio)


def _total_variation(log_p: Entries, log_q: Entries, mix: float) -> Entries:
    """sum |p - q| / 2."""
    return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))


TERMS: dict[str, Callable[[Entries, Entries, float], Entries]] = {
    "forward": _forward,
    "reverse": _reverse,
    "jsd": _jsd,
    "skew_forward": _skew_forward,
    "skew_reverse": _skew_reverse,
    "total_variation": _total_variation,
}
