"""From the curves of the byte-level arms to measurements."""

from typing import NamedTuple

import numpy as np

from experiments.distillation.arms import (
    ARMS,
    PLAIN,
    TAUGHT,
    Settings,
    arm_config,
    flops_per_token,
    seeds_of,
    teacher_training,
)
from experiments.distillation.curves import Curves, final, first_below, lowest, trait
from moe_jax.base.result import Measurement
from moe_jax.study.results import seed_difference, seed_mean

BITS = "bits per byte"
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
OWN_TEXT = "own_text_bits"


class Savings(NamedTuple):
    """The cost of `scratch` over an arm's cost of reaching the final loss of `scratch`."""

    tokens: float
    flops_teacher_given: float
    """With the teacher's reading counted."""
    flops: float
    """With the teacher's training counted, too."""


def savings(curves: Curves, settings: Settings, name: str) -> Savings | None:
    """Medians over seeds, or None if a seed does not reach the loss."""
    config = arm_config(name, settings)
    scratch = arm_config("scratch", settings)
    update = flops_per_token(ARMS[name], config)
    whole = scratch.steps * flops_per_token(ARMS["scratch"], scratch)
    of_seeds = []
    for curve, plain in zip(curves[name], curves["scratch"], strict=False):
        needed = first_below(curve, plain.bits[-1])
        if needed is None:
            return None
        spent = needed * update
        with_training = spent + teacher_training(settings)
        of_seeds.append((scratch.steps / needed, whole / spent, whole / with_training))
    return Savings(*np.median(of_seeds, axis=0).tolist())


def measurements(curves: Curves, settings: Settings) -> list[Measurement]:
    """All of them, those with agreed names first."""
    seeds = settings.all_seeds()
    routes = tuple(name for name in TAUGHT if ARMS[name].sparse and name in curves)
    saved = {name: savings(curves, settings, name) for name in (*routes, "upcycled")}
    # The agreed comparisons are over all seeds, so arms with fewer seeds are no candidates.
    complete = [name for name in TAUGHT if seeds_of(name, settings) == seeds]
    rows = _best_savings({name: saved[name] for name in routes if name in complete})
    best = lowest(curves, complete)
    compared = {
        "student_minus_teacher_bits": (best, "teacher"),
        "student_minus_best_plain_bits": (best, lowest(curves, PLAIN)),
    } | DIFFERENCES
    for name, (arm, baseline) in compared.items():
        if arm in curves and baseline in curves:
            rows.append(
                seed_difference(
                    name,
                    final(curves, arm),
                    final(curves, baseline),
                    baseline=baseline,
                    unit=f"{BITS} ({arm})",
                    seeds=seeds,
                )
            )
    for name, of_arm in saved.items():
        value = of_arm.tokens if of_arm else None
        rows.append(Measurement(f"{name}.tokens_to_scratch_loss_ratio", value, "ratio", "scratch"))
    rows += [seed_mean(f"{a}.bits", final(curves, a), unit=BITS, seeds=seeds) for a in curves]
    return rows + _expert_traits(curves, seeds) + _own_text(curves, seeds)


def _best_savings(candidates: dict[str, Savings | None]) -> list[Measurement]:
    """The savings of the arm that needs the fewest tokens, None if no arm reaches the loss."""
    reached = {name: saved for name, saved in candidates.items() if saved}
    name = max(reached, key=lambda arm: reached[arm].tokens) if reached else None
    saved = reached[name] if name else None
    unit = f"ratio ({name})"
    return [
        Measurement(
            "tokens_to_scratch_loss_ratio", saved.tokens if saved else None, unit, "scratch"
        ),
        Measurement(
            "flops_to_scratch_loss_ratio",
            saved.flops if saved else None,
            f"{unit}, all FLOPs",
            "scratch",
        ),
        Measurement(
            "flops_to_scratch_loss_ratio_teacher_given",
            saved.flops_teacher_given if saved else None,
            unit,
            "scratch",
        ),
    ]


def _expert_traits(curves: Curves, seeds: list[int]) -> list[Measurement]:
    """What experts have become, and how upcycled ones differ from those of `scratch`."""
    rows = []
    examined = [name for name in curves if curves[name][0].traits]
    for key, (title, unit) in TRAITS.items():
        means = {name: trait(curves, name, key).mean(axis=1) for name in examined}
        if "upcycled" in means:
            rows.append(
                seed_difference(
                    f"upcycled_minus_scratch_{title}",
                    means["upcycled"],
                    means["scratch"],
                    baseline="scratch",
                    unit=unit,
                    seeds=seeds,
                )
            )
        rows += [seed_mean(f"{n}.{title}", v, unit=unit, seeds=seeds) for n, v in means.items()]
    return rows


def _own_text(curves: Curves, seeds: list[int]) -> list[Measurement]:
    """The students' divergence from their teacher on text of their own."""
    rows = []
    writers = [name for name in curves if OWN_TEXT in curves[name][0].traits]
    for name in writers:
        values = trait(curves, name, OWN_TEXT)
        rows.append(seed_mean(f"{name}.{OWN_TEXT}", values, unit=BITS, seeds=seeds))
        off_policy = name.removesuffix("_on_policy")
        if off_policy != name and off_policy in writers:
            rows.append(
                seed_difference(
                    f"{name}_minus_{off_policy}_{OWN_TEXT}",
                    values,
                    trait(curves, off_policy, OWN_TEXT),
                    baseline=off_policy,
                    unit=BITS,
                    seeds=seeds,
                )
            )
    return rows
