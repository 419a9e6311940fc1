"""The plots of the adversarial experiment."""

import numpy as np
from matplotlib.figure import Figure

from experiments.adversarial.generative import TEMPERATURES
from moe_jax.study.arms import Runs, seed_values
from moe_jax.study.plots import highest_mean_first, plot_dots


def draw_bits(runs: Runs, title: str) -> Figure:
    """Each arm's held-out bits: every seed, and the mean."""
    figure = Figure(figsize=(7, 0.32 * len(runs) + 1.1), layout="constrained")
    axes = figure.subplots()
    values = {arm: seed_values(runs, arm) for arm in runs}
    plot_dots(axes, values, highest_mean_first(values))
    axes.set(xlabel="held-out bits per byte (each seed, and the mean)", title=title)
    return figure


def draw_frontier(runs: Runs) -> Figure:
    """Quality against coverage over temperatures, and the discriminators. Means of the seeds."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in runs:
        x = np.mean(seed_values(runs, arm, "own_on_teacher"), axis=0)
        y = np.mean(seed_values(runs, arm, "teacher_on_own"), axis=0)
        left.plot(x, y, ".-", label=arm)
        if "accuracy" in runs[arm][0]:
            accuracy = np.mean(seed_values(runs, arm, "accuracy"), axis=0)
            width = min(10, len(accuracy))
            right.plot(np.convolve(accuracy, np.ones(width) / width, "valid"), label=arm)
    left.set(
        xlabel="student's bits per byte on the teacher's text",
        ylabel="teacher's bits per byte on the student's text",
        title=f"temperatures {TEMPERATURES[0]} (top right to left) to {TEMPERATURES[-1]}",
    )
    left.legend(frameon=False)
    right.axhline(0.5, color="0.7", lw=1)  # guessing
    right.set(xlabel="rounds", ylabel="discriminator's accuracy, mean of 10 rounds", ylim=(0, 1))
    right.legend(frameon=False)
    return figure
