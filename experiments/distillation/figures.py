"""What the byte-level runs of lever_distillation add up to: figures, sentences, plots."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from distillation_arms import (
    ARMS,
    UPCYCLE,
    Curve,
    Curves,
    Settings,
    arm_config,
    flops_per_token,
    seeds_of,
    teacher_config,
)
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from moe_jax.base.result import Measurement

TAUGHT = tuple(name for name, arm in ARMS.items() if arm.alpha > 0)
PLAIN = tuple(name for name, arm in ARMS.items() if arm.alpha == 0 and name != "teacher")
DIFFERENCES = {
    "upcycled_kd_minus_upcycled_bits": ("upcycled_kd", "upcycled"),
    "kd_minus_scratch_bits": ("kd", "scratch"),
    "self_kd_minus_teacher_bits": ("self_kd", "teacher"),
    "kd_sampled_minus_kd_bits": ("kd_sampled", "kd"),
    "kd_top_k_minus_kd_bits": ("kd_top_k", "kd"),
    "kd_sampled_minus_kd_top_k_bits": ("kd_sampled", "kd_top_k"),
    "kd_on_policy_minus_kd_bits": ("kd_on_policy", "kd"),
    "upcycled_kd_on_policy_minus_upcycled_kd_bits": ("upcycled_kd_on_policy", "upcycled_kd"),
    "upcycled_exact_minus_upcycled_bits": ("upcycled_exact", "upcycled"),
    "upcycled_half_new_minus_upcycled_bits": ("upcycled_half_new", "upcycled"),
}
TRAITS = {
    "class_nats": ("expert_domain_nats", "nats (of log 3 = 1.10)"),
    "token_nats": ("expert_byte_nats", "nats"),
    "load_entropy": ("expert_load_entropy", "of log E"),
    "weight_cosine": ("expert_weight_cosine", "cosine"),
    "output_cosine": ("expert_output_cosine", "cosine"),
}
"""distill.specialise's fields, their names in result.json (mean over blocks) and units."""
OWN = "own_text_bits"


def first_below(curve: Curve, bits: float) -> float | None:
    """Updates after which the curve is first at `bits`, between two evaluations on a straight line;
    None if it never is. A curve that begins below counts from its first evaluation, so that a ratio
    made of it is a lower bound."""
    for index, value in enumerate(curve.bits):
        if value <= bits:
            if index == 0:
                return float(curve.steps[0])
            begin, end = curve.bits[index - 1], value
            share = (begin - bits) / (begin - end)
            return curve.steps[index - 1] + share * (curve.steps[index] - curve.steps[index - 1])
    return None


def interval(values: list[float]) -> tuple[float, list[float] | None]:
    """Mean and 95% t-interval of paired differences; no interval from one of them."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None
    half = float(student_t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1))
    half /= len(values) ** 0.5
    return mean, [mean - half, mean + half]


def final(curves: Curves, name: str) -> np.ndarray:
    """Bits per byte at the end, one a seed."""
    return np.array([curve.bits[-1] for curve in curves[name]])


def lowest(curves: Curves, names: tuple[str, ...]) -> str:
    """The arm of the lowest mean loss."""
    return min(
        (name for name in names if name in curves),
        key=lambda name: float(final(curves, name).mean()),
    )


def paired(
    name: str, one: np.ndarray, other: np.ndarray, baseline: str, seeds: list[int], unit: str
) -> Measurement:
    """Mean over the seeds that both have of one's value less the other's."""
    count = min(len(one), len(other))
    mean, bounds = interval((one[:count] - other[:count]).tolist())
    return Measurement(name, mean, unit, baseline, seeds=seeds[:count], interval=bounds)


def over_seeds(name: str, values: Any, unit: str, seeds: list[int]) -> Measurement:
    mean, bounds = interval([float(value) for value in values])
    return Measurement(name, mean, unit, seeds=seeds[: len(values)], interval=bounds)


def savings(curves: Curves, settings: Settings, name: str) -> tuple[float, float, float] | None:
    """Of an arm, the median over seeds: scratch's tokens over those needed to reach its final loss;
    the same in FLOPs with the teacher's reading, and with its training too. None: not reached."""
    arm, config = ARMS[name], arm_config(name, settings)
    scratch = arm_config("scratch", settings)
    teaching = settings.teacher_steps * flops_per_token(ARMS["teacher"], teacher_config())
    own, base = flops_per_token(arm, config), flops_per_token(ARMS["scratch"], scratch)
    found = []
    for curve, plain in zip(curves[name], curves["scratch"], strict=False):
        needed = first_below(curve, plain.bits[-1])
        if needed is None:
            return None
        spent = needed * own
        whole = scratch.steps * base
        found.append((scratch.steps / needed, whole / spent, whole / (spent + teaching)))
    tokens, read, taught = np.median(found, axis=0)
    return float(tokens), float(read), float(taught)


def describe(curves: Curves, settings: Settings) -> list[Measurement]:
    """The figures, those with agreed names first."""
    seeds = settings.all_seeds()
    routes = tuple(n for n in TAUGHT if ARMS[n].sparse and n in curves)
    saved = {name: savings(curves, settings, name) for name in (*routes, "upcycled")}
    reached = [name for name in routes if saved[name] and seeds_of(name, settings) == seeds]
    fastest = max(reached, key=lambda name: saved[name][0]) if reached else None  # pyright: ignore
    tokens, read, taught = saved[fastest] or (None,) * 3 if fastest else (None,) * 3
    # The agreed comparisons are over all seeds.
    whole = tuple(n for n in TAUGHT if seeds_of(n, settings) == seeds)
    best, plain = lowest(curves, whole), lowest(curves, PLAIN)
    rows = [
        Measurement("tokens_to_scratch_loss_ratio", tokens, f"ratio ({fastest})", "scratch"),
        Measurement(
            "flops_to_scratch_loss_ratio", taught, f"ratio ({fastest}), all FLOPs", "scratch"
        ),
        Measurement(
            "flops_to_scratch_loss_ratio_teacher_given", read, f"ratio ({fastest})", "scratch"
        ),
    ]
    compared = {
        "student_minus_teacher_bits": (best, "teacher"),
        "student_minus_best_plain_bits": (best, plain),
    } | DIFFERENCES
    for name, (one, other) in compared.items():
        if one in curves and other in curves:
            unit = f"bits per byte ({one})"
            values = final(curves, one), final(curves, other)
            rows.append(paired(name, *values, other, seeds, unit))
    for name, found in saved.items():
        value = found[0] if found else None
        rows.append(Measurement(f"{name}.tokens_to_scratch_loss_ratio", value, "ratio", "scratch"))
    for name in curves:
        rows.append(over_seeds(f"{name}.bits", final(curves, name), "bits per byte", seeds))
    return rows + describe_traits(curves, seeds)


def trait(curves: Curves, name: str, key: str) -> np.ndarray:
    """One of an arm's traits, a row a seed: a number, or one for each block."""
    return np.array([curve.traits[key] for curve in curves[name]])


def describe_traits(curves: Curves, seeds: list[int]) -> list[Measurement]:
    """The experts' and the students' own text, and what sets upcycled experts apart."""
    rows = []
    examined = [name for name in curves if curves[name][0].traits]
    for key, (title, unit) in TRAITS.items():
        means = {name: trait(curves, name, key).mean(axis=1) for name in examined}
        if "upcycled" in means:
            values = means["upcycled"], means["scratch"]
            rows.append(paired(f"upcycled_minus_scratch_{title}", *values, "scratch", seeds, unit))
        rows += [over_seeds(f"{name}.{title}", v, unit, seeds) for name, v in means.items()]
    writers = [name for name in examined if OWN in curves[name][0].traits]
    for name in writers:
        rows.append(over_seeds(f"{name}.{OWN}", trait(curves, name, OWN), "bits per byte", seeds))
        off = name.removesuffix("_on_policy")
        if off != name and off in writers:
            values = trait(curves, name, OWN), trait(curves, off, OWN)
            title = f"{name}_minus_{off}_{OWN}"
            rows.append(paired(title, *values, off, seeds, "bits per byte"))
    return rows


def say(row: Measurement) -> str:
    """A difference, and whether its interval excludes 0."""
    assert row.value is not None
    if row.interval is None:
        return f"{row.value:+.3f} (one seed)"
    sure = row.interval[1] < 0 or row.interval[0] > 0
    return f"{row.value:+.3f} ({'' if sure else 'not '}significant)"


def verdict(found: Mapping[str, Measurement]) -> str:
    """What held of the article's sentence."""
    tokens, all_flops = (found[f"{n}_to_scratch_loss_ratio"].value for n in ("tokens", "flops"))
    saved = (
        "no taught student reached the loss of the one from scratch"
        if tokens is None or all_flops is None
        else f"a taught student reaches the loss of one from scratch with {tokens:.1f}x fewer "
        f"tokens of its own; with the teacher's training counted the one from scratch needs "
        f"{all_flops:.2f}x the FLOPs of the taught one"
    )
    sentences = [
        f"{saved}; against its teacher the best student stands at "
        f"{say(found['student_minus_teacher_bits'])} bits per byte, against the best training "
        f"without a teacher's advice ({found['student_minus_best_plain_bits'].baseline}) at "
        f"{say(found['student_minus_best_plain_bits'])} (the plain training that is tuned over "
        "steps, dropout and weight decay is lever_adversarial's part beyond); the teacher's "
        f"advice adds {say(found['upcycled_kd_minus_upcycled_bits'])} to upcycling and "
        f"{say(found['kd_minus_scratch_bits'])} to training from scratch"
        if "upcycled_kd_minus_upcycled_bits" in found
        else saved,
        *_variants(found),
        "models of 0.2M to 0.5M parameters on bytes, one corpus",
    ]
    return "; ".join(sentences)


def _variants(found: Mapping[str, Measurement]) -> list[str]:
    """Cached against online, on-policy against off-policy, and the experts."""
    sentences = []
    cached = [f"kd_{kind}_minus_kd_bits" for kind in ("sampled", "top_k")]
    if all(name in found for name in cached):
        sampled, top_k = (say(found[name]) for name in cached)
        sentences.append(
            f"from a cache of 12 samples a token the student ends {sampled} from whole "
            f"distributions, of the 5 best and the tail {top_k}"
        )
    for off in ("kd", "upcycled_kd"):
        bits, own = (f"{off}_on_policy_minus_{off}_{kind}" for kind in ("bits", OWN))
        if bits in found:
            sentences.append(
                f"half of its batches written by the student itself: {say(found[bits])} on held-"
                f"out text and {say(found[own])} in divergence from the teacher on its own text "
                f"({off})"
            )
    apart = "upcycled_minus_scratch_expert"
    if f"{apart}_domain_nats" in found:
        alike, other = (
            found[f"{name}.expert_output_cosine"].value or 0.0 for name in ("upcycled", "scratch")
        )
        sentences.append(
            f"upcycled experts {'stay alike' if alike > 0.5 else 'part ways'} (cosine of their "
            f"outputs {alike:.2f}, from scratch {other:.2f}), and their routing knows "
            f"{say(found[f'{apart}_domain_nats'])} nats about the domain and "
            f"{say(found[f'{apart}_byte_nats'])} about the byte beside experts from scratch"
        )
    return sentences


SHOWN = tuple(
    name
    for name, arm in ARMS.items()
    if not arm.on_policy and arm.teaching == "online" and arm.upcycle == UPCYCLE
)
"""Arms in draw_curves; draw_ends has all of them."""
EXAMINED = ("scratch", "kd", "upcycled", "upcycled_exact", "upcycled_half_new", "upcycled_kd")
"""Arms in draw_experts."""


def draw_curves(curves: Curves, settings: Settings) -> Figure:
    """Mean loss over tokens, and over FLOPs with the teacher's."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    teaching = settings.teacher_steps * flops_per_token(ARMS["teacher"], teacher_config())
    shown = [name for name in SHOWN if name in curves]
    for index, name in enumerate(shown):
        arm, config, found = ARMS[name], arm_config(name, settings), curves[name]
        tokens = config.batch * config.data.length
        steps, bits = np.array(found[0].steps), np.mean([c.bits for c in found], axis=0)
        needs = teaching if arm.alpha or arm.start != "random" else 0.0
        line = "--" if arm.alpha == 0 else "-"
        left.plot(steps * tokens, bits, line, color=f"C{index}", label=name)
        spent = (steps * flops_per_token(arm, config) + needs) * tokens
        right.plot(spent, bits, line, color=f"C{index}")
    left.set(xlabel="tokens that the student reads", ylabel="held-out bits per byte")
    right.set(xlabel="FLOPs, the teacher's training and reading included")
    low = min(float(final(curves, name).mean()) for name in shown)
    left.set_ylim(low - 0.1, low + 1.5)
    left.legend(frameon=False, fontsize=8)
    return figure


def draw_ends(curves: Curves) -> Figure:
    """Each arm's held-out bits at the end, and its students' divergence on their own text."""
    figure = Figure(figsize=(10, 0.3 * len(curves) + 1.1), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    order = sorted(curves, key=lambda name: -final(curves, name).mean())
    for place, name in enumerate(order):
        values = [final(curves, name)]
        if OWN in curves[name][0].traits:
            values.append(trait(curves, name, OWN))
        for ax, value in zip(axes, values, strict=False):
            ax.plot(value, [place] * len(value), ".", color="0.7")
            ax.plot(value.mean(), place, "o", color="C1" if ARMS[name].alpha else "C0")
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set(xlabel="held-out bits per byte (taught: orange)")
    axes[1].set(xlabel="KL(student ‖ teacher) on its own text, bits per byte")
    return figure


def draw_experts(curves: Curves) -> Figure:
    """What the experts became, block by block: mean and range over the seeds."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    axes = figure.subplots(1, 4)
    panels = {
        "class_nats": "nats of expert and domain",
        "token_nats": "nats of expert and byte",
        "load_entropy": "entropy of loads / log E",
        "output_cosine": "cosine of experts' outputs",
    }
    examined = [name for name in EXAMINED if name in curves]
    for ax, (key, title) in zip(axes, panels.items(), strict=True):
        for index, name in enumerate(examined):
            values = trait(curves, name, key)
            blocks = np.arange(1, values.shape[1] + 1)
            line = "-" if ARMS[name].start == "upcycled" else "--"
            ax.plot(blocks, values.mean(0), f"{line}o", ms=4, color=f"C{index}", label=name)
            ax.fill_between(blocks, values.min(0), values.max(0), color=f"C{index}", alpha=0.12)
        ax.set(xlabel="block", title=title, xticks=blocks)  # pyright: ignore
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def report(found: list[Measurement]) -> None:
    """One line a figure."""
    for m in found:
        value = "not reached" if m.value is None else f"{m.value:.4g}"
        bounds = "" if m.interval is None else f"  [{m.interval[0]:.4g}, {m.interval[1]:.4g}]"
        print(f"{m.name:52} {value:>12} {m.unit}{bounds}")
