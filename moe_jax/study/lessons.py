"""Figures of the notebooks in colab/: routing rules beside each other, memory beside speed."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.config import MoEConfig
from moe_jax.moe.rules import RULES, RoutingContext
from moe_jax.predict.answer import Answer

TOKENS = 24
FAVOUR = 1.5
"""How much higher the logits of the most popular expert are than those of the least popular."""
GIB = 2**30


def choices(config: MoEConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(scores [T, E], whether the rule takes an expert for a token [T, E]) of TOKENS random tokens.

    Experts with low numbers are more popular, as in a model whose loads nothing balances.
    """
    key = jax.random.key(seed)
    logits = jax.random.normal(key, (TOKENS, config.experts))
    logits += FAVOUR * jnp.linspace(1, 0, config.experts)
    scores = jax.nn.sigmoid(logits)
    context = RoutingContext(tokens=jnp.arange(TOKENS), key=key)
    chosen = RULES[config.rule](scores, config, context)
    taken = (chosen[:, :, None] == jnp.arange(config.experts)).any(axis=1)
    return np.asarray(scores), np.asarray(taken)


def draw_choices(configs: Sequence[MoEConfig], seed: int = 0) -> Figure:
    """A panel a rule: scores as shades, the experts that tokens go to as dots, and their loads."""
    figure = Figure(figsize=(2.3 * len(configs), 6), layout="constrained")
    panels = figure.subplots(
        2, len(configs), sharex="col", sharey="row", squeeze=False, height_ratios=(1, 4)
    )
    for (load, grid), config in zip(panels.T, configs, strict=True):
        scores, taken = choices(config, seed)
        load.bar(range(config.experts), taken.sum(axis=0), color="tab:blue")
        load.axhline(taken.sum() / config.experts, linestyle=":", color="gray")
        load.set_title(f"{config.rule}, K = {config.experts_per_token}", fontsize=10)
        grid.imshow(scores, cmap="Greys", vmin=0, vmax=1.5, aspect="auto")
        token, expert = np.nonzero(taken)
        grid.plot(expert, token, "o", color="tab:orange", markersize=5)
        grid.set(xlabel="expert", xticks=range(config.experts))
    panels[0, 0].set_ylabel("load")
    panels[1, 0].set_ylabel("token")
    return figure


def draw_speeds(speeds: Mapping[str, float], unit: str, reference: float | None = None) -> Figure:
    """A bar for each speed. `reference`: a line at the speed that the others are compared with."""
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(speeds)), layout="constrained")
    axes = figure.subplots()
    _bars(axes, speeds, "tab:blue")
    if reference is not None:
        axes.axvline(reference, linestyle=":", color="gray")
    axes.set_xlabel(unit)
    return figure


def _bars(axes: Axes, values: Mapping[str, float], color: str) -> None:
    """Horizontal bars, the first one on top, each with its number."""
    bars = axes.barh(list(values), list(values.values()), color=color)
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()


def draw_answers(answers: Mapping[str, Answer]) -> Figure:
    """Memory of a device as a share of the card, and PREDICTED tokens a second of a device.

    A plan whose memory is red does not fit. Its time is drawn in grey.
    """
    figure = Figure(figsize=(11, 1.2 + 0.5 * len(answers)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(answers)
    shares = [found.memory.total / found.memory.card for found in answers.values()]
    fits = [found.memory.fits for found in answers.values()]
    left.barh(names, shares, color=["tab:blue" if fit else "tab:red" for fit in fits])
    left.axvline(1, color="black")
    left.set_xlabel("memory of a device / memory of the card")
    for place, (found, fit) in enumerate(zip(answers.values(), fits, strict=True)):
        time = found.prediction
        ends = sorted((found.rate(time.low), found.rate(time.high)))
        right.plot(ends, [place] * 2, color="black" if fit else "0.7")
        right.plot(found.rate(time.seconds), place, "o", color="tab:blue" if fit else "0.7")
    right.set_xlim(left=0)
    right.set_xlabel("tokens/s of a device, PREDICTED, with its interval")
    left.invert_yaxis()
    return figure
