"""Routing traces out of a few numbers, fitted to a recorded one: Zipf popularity, Markov repeats.

In every domain and layer the experts have a popularity rank^-exponent over a ranking of the
domain's own. A token keeps each expert of the token before it with probability `repeat` and draws
the others by popularity, without replacement. After a token the domain changes with probability
`switch`, to any other: so popularity drifts.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moe_jax.base.errors import require
from moe_jax.base.seeds import check_seed
from moe_jax.placement.trace import Trace

MOST_RANKS = 1 << 24
"""Experts of all layers and domains that a generated trace may have."""


class ZipfMarkov(NamedTuple):
    """The generator's parameters."""

    layers: int
    experts: int
    per_token: int
    domains: int
    exponent: float
    """Popularity of the r-th expert (from 1) is proportional to r^-exponent."""
    repeat: float
    """Probability that an expert of the last token is kept, besides being drawn again."""
    switch: float
    """Probability that the domain changes after a token."""


def fit(trace: Trace) -> ZipfMarkov:
    """Parameters whose traces resemble `trace`.

    exponent: least squares of log popularity over log rank, every domain and layer centred on its
    own mean. repeat: (o - c) / (1 - c), where o is the share of a token's experts that it has in
    common with the token before it in its domain, and c the same share with a token of the domain
    drawn at random. switch: changes of domain over tokens. UserError: fewer than two tokens.
    """
    require(len(trace.chosen) > 1, "a trace of one token has no neighbours to fit a process to")
    experts = trace.experts
    per_token = trace.chosen.shape[2]
    changed = trace.domain[1:] != trace.domain[:-1]
    used = np.unique(trace.domain)
    same_domain = _overlap(trace.chosen[1:], trace.chosen[:-1])[~changed]
    generator = np.random.default_rng(0)
    chance: list[tuple[float, int]] = []
    slopes: list[float] = []
    for domain in used:
        own = trace.chosen[trace.domain == domain]
        chance.append((_overlap(own, generator.permutation(own)).mean(), len(own)))
        slopes += [_slope(own[:, layer], experts) for layer in range(trace.layers)]
    independent = float(np.average([c for c, _ in chance], weights=[n for _, n in chance]))
    # Where every token changes the domain, nothing tells how often an expert is kept.
    overlap = float(same_domain.mean()) if len(same_domain) else independent
    repeat = (overlap - independent) / max(1e-9, 1 - independent)
    return ZipfMarkov(
        trace.layers,
        experts,
        per_token,
        len(used),
        exponent=float(np.mean(slopes)),
        repeat=float(np.clip(repeat, 0, 1)),
        switch=float(changed.mean()) if len(used) > 1 else 0.0,
    )


def _overlap(
    one: Int[np.ndarray, "T layers K"], other: Int[np.ndarray, "T layers K"]
) -> np.ndarray:
    """Share of the first token's experts that the second one has too: [T]."""
    same = np.zeros(one.shape, bool)
    # Slot by slot, because all pairs of slots at once would take K times the memory of the trace.
    for slot in range(other.shape[2]):
        same |= one == other[..., slot, None]
    return same.mean(axis=(1, 2))


def _slope(chosen: Int[np.ndarray, "T K"], experts: int) -> float:
    """- d log popularity / d log rank, over the experts that were used at all, weighted by 1/rank
    so that every octave of ranks counts the same."""
    counts = np.sort(np.bincount(chosen.ravel(), minlength=experts)[:experts])[::-1]
    counts = counts[counts > 0]
    if len(counts) < 2:
        return 0.0
    rank = np.arange(1, len(counts) + 1)
    slope = np.polyfit(np.log(rank), np.log(counts), 1, w=rank**-0.5)[0]
    return max(0.0, -float(slope))


def generate_trace(parameters: ZipfMarkov, tokens: int, seed: int = 0) -> Trace:
    """`tokens` tokens from the generator. UserError: impossible parameters, or no such seed."""
    check_seed("seed", seed)
    p = parameters
    require(0 < p.per_token <= p.experts, f"K={p.per_token} is not in 1 … E={p.experts}")
    require(p.layers > 0 and p.domains > 0 and tokens > 0, f"{p} with {tokens} tokens is empty")
    rankings = p.domains * p.layers * p.experts
    require(
        rankings <= MOST_RANKS,
        f"{p.domains} domains with {p.layers} layers of {p.experts} experts have {rankings} "
        f"ranks: at most {MOST_RANKS} are drawn",
    )
    require(0 <= p.repeat <= 1 and 0 <= p.switch <= 1, f"{p}: repeat and switch are probabilities")
    generator = np.random.default_rng(seed)
    popularity = np.arange(1, p.experts + 1) ** -p.exponent
    rankings = np.array(
        [[generator.permutation(p.experts) for _ in range(p.layers)] for _ in range(p.domains)]
    )
    log_odds = np.log(popularity)[rankings]  # [domains, layers, E]
    domain = 0
    previous = None
    chosen = np.empty((tokens, p.layers, p.per_token), np.uint16)
    labels = np.empty(tokens, np.int16)
    for token in range(tokens):
        if p.domains > 1 and token and generator.random() < p.switch:
            domain = (domain + int(generator.integers(1, p.domains))) % p.domains
        previous = _draw(log_odds[domain], previous, p, generator)
        chosen[token] = previous
        labels[token] = domain
    names = tuple(f"domain {index}" for index in range(p.domains))
    return Trace(chosen, labels, p.experts, names, f"Zipf-Markov {p._asdict()}, seed {seed}")


def _draw(
    log_odds: Float[np.ndarray, "layers E"],
    previous: Int[np.ndarray, "layers K"] | None,
    p: ZipfMarkov,
    generator: np.random.Generator,
) -> Int[np.ndarray, "layers K"]:
    """One token's experts: Gumbel top-K draws by popularity without replacement, and kept experts
    come before all others."""
    score = log_odds + generator.gumbel(size=log_odds.shape)
    if previous is not None:
        kept = generator.random(previous.shape) < p.repeat
        # 1e6 is more than any Gumbel draw, so a kept expert is always among the first K.
        rows = np.arange(len(score))[:, None]
        score[rows, previous] += np.where(kept, 1e6, 0.0)
    return np.argsort(-score, axis=1)[:, : p.per_token]
