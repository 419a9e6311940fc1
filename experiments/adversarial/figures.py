"""The plots of the adversarial experiment."""

import numpy as np
from matplotlib.figure import Figure

from experiments.adversarial import data, generative
from experiments.adversarial.generative import TEMPERATURES
from moe_jax.base.figures import readable, whole_ticks
from moe_jax.study.arms import Runs, seed_values
from moe_jax.study.plots import highest_mean_first, plot_dots

LABELS = {
    "data": data.ARMS | {f"kd_{arm}": f"with a teacher: {data.ARMS[arm]}" for arm in data.KD_ARMS},
    "perturbation": {
        "kd": "nothing perturbed",
        "kd_equal_flops": "nothing perturbed, more updates",
        "virtual": "adversarial shift of embeddings",
        "virtual_small": "adversarial shift of embeddings, small",
        "random": "control: random shift of embeddings",
        "random_small": "control: random shift of embeddings, small",
        "swaps": "adversarial swaps of bytes",
        "random_swaps": "control: random swaps of bytes",
    },
    "generative": generative.ARMS,
    "beyond": {
        "plain": "plain training, tuned",
        "plain_untuned": "plain training, not tuned",
        "self_kd": "taught by itself",
        "generations": "taught by itself, generation after generation",
        "ensemble": "taught by an ensemble",
        "given_self_kd": "taught by itself, the teacher for free",
        "given_generations": "generations, the first teacher for free",
        "given_ensemble": "taught by an ensemble that was for free",
    },
}
"""What the arms of each part are called in the plots. The others go by their names."""


def draw_bits(runs: Runs, part: str) -> Figure:
    """Held-out bits of each arm of a part: every seed, and the mean."""
    figure = Figure(figsize=(9, 0.42 * len(runs) + 1.3), layout="constrained")
    axes = figure.subplots()
    values = {arm: seed_values(runs, arm) for arm in runs}
    plot_dots(axes, values, highest_mean_first(values), labels=LABELS[part])
    axes.set(xlabel="held-out bits per byte (each seed, and the mean)", title=part)
    return figure


def draw_frontier(runs: Runs) -> Figure:
    """Quality against coverage over temperatures, and the discriminators. Means of the seeds."""
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in runs:
        x = np.mean(seed_values(runs, arm, "own_on_teacher"), axis=0)
        y = np.mean(seed_values(runs, arm, "teacher_on_own"), axis=0)
        label = readable(generative.ARMS[arm])
        line = left.plot(x, y, ".-", label=label)[0]
        if "accuracy" in runs[arm][0]:
            accuracy = np.mean(seed_values(runs, arm, "accuracy"), axis=0)
            width = min(10, len(accuracy))
            mean = np.convolve(accuracy, np.ones(width) / width, "valid")
            right.plot(mean, color=line.get_color())
    left.set(
        xlabel="student's bits per byte on the teacher's text",
        ylabel="teacher's bits per byte on the student's text",
        title=f"temperatures {TEMPERATURES[0]} (top right to left) to {TEMPERATURES[-1]}",
    )
    right.axhline(0.5, color="0.7", lw=1)  # guessing
    right.set(xlabel="rounds", ylabel="discriminator's accuracy, mean of 10 rounds", ylim=(0, 1))
    whole_ticks(right)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure
