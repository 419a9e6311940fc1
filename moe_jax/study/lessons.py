"""What the notebooks in colab/ show: routing rules beside each other, speeds, and plans."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.config import MoEConfig
from moe_jax.moe.rules import RULES, RoutingContext
from moe_jax.predict.answer import Answer
from moe_jax.study.layer_case import Shape, layer, make_inputs, moe_config, with_gradients

TOKENS = 24
FAVOUR = 1.5
"""How much higher the logits of the most popular expert are than those of the least popular."""
LEAST_ERROR = 1e-8


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


IMPLEMENTATIONS: tuple[Literal["reference", "xla"], ...] = ("reference", "xla")


def layer_speeds(shape: Shape, rounds: int = 5) -> dict[str, float]:
    """GFLOP/s of a layer, forward and backward, by implementation: the best of some rounds."""
    inputs = make_inputs(shape, seed=0)
    both = (inputs.cotangent, inputs.arguments)
    speeds = {}
    for name in IMPLEMENTATIONS:
        run = jax.jit(with_gradients(layer(moe_config(shape, name)))).lower(*both).compile()
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            jax.block_until_ready(run(*both))
            seconds.append(time.perf_counter() - begin)
        speeds[name] = 3 * shape.flops / min(seconds) / 1e9
    return speeds


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


def draw_errors(errors: Mapping[str, Mapping[int, float]], axis: str) -> Figure:
    """The largest error of each kernel over the sizes that it was tried at.

    What is below LEAST_ERROR, such as 0, is drawn there.
    """
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, found in errors.items():
        values = np.maximum(list(found.values()), LEAST_ERROR)
        axes.semilogy(list(found), values, "o-", markersize=4, label=name)
    axes.set(xlabel=axis, ylabel="largest error")
    axes.legend()
    return figure


def draw_audit(
    rows: Mapping[int, Sequence[Mapping[str, Any]]], columns: Sequence[str], axis: str
) -> Figure:
    """Columns of the audit over a choice: a panel a column, a line for each compute capability.

    `rows`: choice -> its rows, one for each architecture.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    archs = [row["arch"] for row in next(iter(rows.values()))]
    for panel, column in zip(figure.subplots(1, len(columns)), columns, strict=True):
        for place, arch in enumerate(archs):
            values = [found[place][column] for found in rows.values()]
            panel.plot(list(rows), values, "o-", markersize=4, label=f"sm_{arch}")
        panel.set(xlabel=axis, title=column.replace("_", " "), xticks=list(rows))
        panel.set_ylim(bottom=0)
    figure.axes[0].legend()
    return figure
