"""The plots of the byte-level arms."""

import numpy as np
from matplotlib.figure import Figure

from experiments.distillation.arms import (
    ARMS,
    TAUGHT,
    UPCYCLE,
    Settings,
    arm_config,
    flops_per_token,
    teacher_training,
)
from experiments.distillation.curves import Curves, final, trait
from experiments.distillation.measurements import OWN_TEXT
from moe_jax.study.plots import highest_mean_first, plot_band, plot_dots

SHOWN = tuple(
    name
    for name, arm in ARMS.items()
    if not arm.on_policy and arm.teaching == "online" and arm.upcycle == UPCYCLE
)
"""Arms in draw_curves. draw_ends has all of them."""
EXAMINED = ("scratch", "kd", "upcycled", "upcycled_exact", "upcycled_half_new", "upcycled_kd")
"""Arms in draw_experts."""
LABELS = {
    "teacher": "the teacher, dense",
    "scratch": "from scratch",
    "scratch_dropout": "from scratch, dropout",
    "scratch_equal_flops": "from scratch, the taught one's FLOPs",
    "continued": "the teacher trained on, dense",
    "upcycled_exact": "upcycled, no noise",
    "upcycled_half_new": "upcycled, half of the weights new",
    "kd": "taught",
    "kd_alone": "taught by the teacher alone",
    "kd_sampled": "taught by cached samples",
    "kd_top_k": "taught by the cached top k",
    "kd_on_policy": "taught, half on its own text",
    "upcycled_kd": "upcycled and taught",
    "upcycled_kd_on_policy": "upcycled and taught, half on its own text",
    "self_kd": "taught, dense as the teacher",
}
"""What the arms are called in the plots. The others go by their names."""
PANELS = {
    "class_nats": "nats of expert and domain",
    "token_nats": "nats of expert and byte",
    "load_entropy": "entropy of loads / log E",
    "output_cosine": "cosine of experts' outputs",
}


def draw_curves(curves: Curves, settings: Settings) -> Figure:
    """Mean loss over tokens, and over FLOPs with the teacher's."""
    figure = Figure(figsize=(10, 4.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shown = [name for name in SHOWN if name in curves]
    for index, name in enumerate(shown):
        arm = ARMS[name]
        config = arm_config(name, settings)
        tokens = config.batch * config.data.length
        steps = np.array(curves[name][0].steps)
        bits = np.mean([curve.bits for curve in curves[name]], axis=0)
        uses_teacher = arm.alpha or arm.start != "random"
        before = teacher_training(settings) if uses_teacher else 0.0
        line = "-" if arm.alpha else "--"
        left.plot(steps * tokens, bits, line, color=f"C{index}", label=LABELS.get(name, name))
        spent = (steps * flops_per_token(arm, config) + before) * tokens
        right.plot(spent, bits, line, color=f"C{index}")
    left.set(xlabel="tokens that the student reads", ylabel="held-out bits per byte")
    right.set(xlabel="FLOPs, the teacher's training and reading included")
    low = min(float(final(curves, name).mean()) for name in shown)
    left.set_ylim(low - 0.1, low + 1.5)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def draw_ends(curves: Curves) -> Figure:
    """Each arm's held-out bits at the end, and its students' divergence on their own text."""
    figure = Figure(figsize=(10, 0.36 * len(curves) + 1.3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    bits = {name: final(curves, name) for name in curves}
    order = highest_mean_first(bits)
    colors = dict.fromkeys(TAUGHT, "C1")
    plot_dots(left, bits, order, colors, LABELS)
    writers = [name for name in curves if OWN_TEXT in curves[name][0].traits]
    own = {name: trait(curves, name, OWN_TEXT) for name in writers}
    plot_dots(right, own, order, colors, LABELS)
    left.set(xlabel="held-out bits per byte (taught: orange)")
    right.set(xlabel="KL(student ‖ teacher) on its own text, bits per byte")
    return figure


def draw_experts(curves: Curves) -> Figure:
    """What the experts became, block by block: mean and range over the seeds."""
    figure = Figure(figsize=(12, 4.1), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    examined = [name for name in EXAMINED if name in curves]
    for ax, (key, title) in zip(axes, PANELS.items(), strict=True):
        for index, name in enumerate(examined):
            values = trait(curves, name, key)  # [seeds, blocks]
            blocks = np.arange(1, values.shape[1] + 1)
            line = "-o" if ARMS[name].start == "upcycled" else "--o"
            label = LABELS.get(name, name)
            plot_band(ax, blocks, values, label=label, color=f"C{index}", line=line)
            ax.set_xticks(blocks)
        ax.set(xlabel="block", title=title)
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure
