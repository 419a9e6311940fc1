"""Where a model sends its tokens: experts by domain, and the tokens of each expert."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from moe_jax.base.figures import readable, whole_ticks
from moe_jax.placement.trace import Trace


def shares_by_domain(trace: Trace) -> Float[np.ndarray, "domains layers E"]:
    """Of a domain's uses of experts in a layer, the fraction of each expert.

    The row of a layer without a use is 0.
    """
    shape = (len(trace.domains), trace.layers, trace.experts)
    shares = np.zeros(shape)
    for domain in range(len(trace.domains)):
        own = trace.chosen[trace.domain == domain]
        for layer in range(trace.layers):
            uses = np.bincount(own[:, layer].ravel(), minlength=trace.experts + 1)[:-1]
            shares[domain, layer] = uses / max(1, uses.sum())
    return shares


def specialisation(
    shares: Float[np.ndarray, "domains layers E"],
) -> Float[np.ndarray, "layers"]:
    """Mutual information of domain and expert in bits, every domain with the same weight.

    I = mean over domains d of sum over experts e of p(e|d) log2(p(e|d) / p(e)). It is 0 where all
    domains use the experts alike, and log2(domains) where no two domains share an expert.
    """
    overall = shares.mean(0)
    ratio = np.divide(shares, overall, out=np.ones_like(shares), where=shares > 0)
    return (shares * np.log2(ratio)).sum(-1).mean(0)


def by_chance(trace: Trace, seed: int) -> Float[np.ndarray, "layers"]:
    """`specialisation` with the domains of the tokens permuted: what a finite sample gives."""
    labels = np.random.default_rng(seed).permutation(trace.domain)
    permuted = Trace(trace.chosen, labels, trace.experts, trace.domains)
    return specialisation(shares_by_domain(permuted))


class TopToken(NamedTuple):
    """A token that an expert gets often."""

    token: int
    share: float
    """Of the token's occurrences, the fraction that goes to the expert."""
    occurrences: int


def top_tokens(
    tokens: Int[np.ndarray, "T"],
    chosen: Int[np.ndarray, "T K"],
    experts: int,
    *,
    count: int,
    least: int,
) -> list[list[TopToken]]:
    """For each expert of a layer, the `count` tokens with the highest shares.

    Tokens with fewer than `least` occurrences are left out. Of equal shares, the more frequent
    token comes first.
    """
    known, index, occurrences = np.unique(tokens, return_inverse=True, return_counts=True)
    uses = np.zeros((experts + 1, len(known)), np.int64)
    np.add.at(uses, (chosen, index[:, None]), 1)
    result = []
    for own in uses[:experts]:
        kept = np.flatnonzero((own > 0) & (occurrences >= least))
        share = own[kept] / occurrences[kept]
        order = kept[np.lexsort((-occurrences[kept], -share))][:count]
        result.append(
            [TopToken(int(known[i]), own[i] / occurrences[i], int(occurrences[i])) for i in order]
        )
    return result


def plot_shares(
    shares: Float[np.ndarray, "domains layers E"], domains: Sequence[str], title: str
) -> Figure:
    """A heat map for each domain: layer by expert, 1 where an expert has 1/E of the uses."""
    _, layers, experts = shares.shape
    height = 1.3 + len(domains) * (0.6 + 0.18 * layers)
    figure = Figure(figsize=(8, height), layout="constrained")
    all_axes = figure.subplots(len(domains), 1, sharex=True, squeeze=False)[:, 0]
    relative = shares * experts
    for axes, own, domain in zip(all_axes, relative, domains, strict=True):
        image = axes.imshow(own, aspect="auto", cmap="viridis", vmin=0, vmax=relative.max())
        axes.set_title(readable(domain), fontsize=9, parse_math=False)
        axes.set_ylabel("layer")
        axes.set_yticks(range(0, layers, max(1, layers // 8)))
    all_axes[-1].set_xlabel("expert")
    whole_ticks(all_axes[-1])
    figure.colorbar(image, ax=list(all_axes), label="uses / uses if all experts were equal")
    figure.suptitle(title, parse_math=False)
    return figure
