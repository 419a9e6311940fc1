"""The seeds that exist: whole numbers of 32 bits, each of which draws differently."""

from typing import Any

from moe_jax.base.errors import require

SEEDS = 2**32
"""Seeds are 0 … SEEDS - 1. JAX drops higher bits: 2**32 would draw what 0 draws."""


def check_seed(name: str, seed: int, count: int = 1) -> None:
    """UserError: one of `count` seeds, from the seed called `name` on, does not exist."""
    require(hasattr(seed, "__index__"), f"{name} is {seed!r}: it must be a whole number")
    last = seed + count - 1
    following = "" if count == 1 else f", and the last of its {count} seeds is {last}"
    require(
        0 <= seed <= last < SEEDS,
        f"{name} is {seed}{following}: a seed must lie between 0 and {SEEDS - 1}",
    )


def check_seeds(settings: Any) -> None:
    """UserError: `settings.seed`, or one of the `settings.seeds` from it on, does not exist."""
    if hasattr(settings, "seed"):
        count = getattr(settings, "seeds", 1)
        # Where `seeds` is no number, it lists the seeds themselves.
        check_seed("seed", settings.seed, count if isinstance(count, int) else 1)
