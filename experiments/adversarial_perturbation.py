"""Adversarial perturbation on top of distillation, beside random perturbation of the same size.

All arms train the same student from the same teacher on the same batches. The perturbed arms read
every batch twice and search for the perturbation, so one more arm is plain distillation with as
many FLOPs as virtual adversarial training takes.
"""

from collections.abc import Mapping
from dataclasses import replace

from adversarial_lab import (
    Lab,
    Runs,
    difference,
    flops,
    measured,
    over_seeds,
    run_config,
    shuffled_batches,
    student_config,
    windows_of,
)

from moe_jax.base.result import Measurement
from moe_jax.objectives.adversarial import PerturbConfig, perturbed_objective, states

SIZES = {"": 0.1, "_small": 0.02}
"""Norm of a shift over the norm of the embeddings; the first is the pilots'."""
ALPHA = 0.5
ARMS = {
    "kd": PerturbConfig("none", ALPHA),
    **{f"virtual{s}": PerturbConfig("virtual", ALPHA, size=size) for s, size in SIZES.items()},
    **{f"random{s}": PerturbConfig("random", ALPHA, size=size) for s, size in SIZES.items()},
    "swaps": PerturbConfig("swaps", ALPHA),
    "random_swaps": PerturbConfig("random_swaps", ALPHA),
    "kd_equal_flops": PerturbConfig("none", ALPHA),
}
CONTROL = {
    "virtual": "random",
    "virtual_small": "random_small",
    "swaps": "random_swaps",
}
"""Of each adversary, the same perturbation without the search for the worst."""


def updates(lab: Lab, arm: str) -> int:
    """Virtual training, in units of the student's forward pass: 3 for the update, 1 for the
    unshifted reading, 3 for the search, 3 for the shifted update, and the teacher's 1."""
    if arm != "kd_equal_flops":
        return lab.scale.perturb_steps
    student, teacher = flops(student_config()) / 3, flops(lab.teacher_model) / 3
    ratio = (10 * student + teacher) / (3 * student + teacher)
    return round(lab.scale.perturb_steps * ratio)


def train_arm(lab: Lab, arm: str, seed: int) -> dict[str, float]:
    """Bits of an arm's student."""
    config = run_config(student_config(), updates(lab, arm), seed)
    documents, _ = lab.text.draw("pool", lab.scale.pool, seed)
    objective = perturbed_objective(ARMS[arm], lab.teacher_model)
    state = lab.train(
        config,
        shuffled_batches(windows_of(documents), seed),
        f"perturbed {ARMS[arm]}",
        objective,
        (lab.teacher,),
    )
    return lab.bits(config.model, states(state))


def run(lab: Lab) -> Runs:
    """Every arm, with every seed."""
    return {
        arm: [
            lab.once(f"perturbation-{arm}-{seed}", lambda: train_arm(lab, arm, seed))  # noqa: B023
            for seed in lab.scale.seeds
        ]
        for arm in ARMS
    }


def best_adversary(runs: Runs) -> str:
    """The adversary with the lowest mean loss: the choice favours it."""
    return min(CONTROL, key=lambda arm: sum(r["bits"] for r in runs[arm]))


def measurements(runs: Runs, lab: Lab) -> list[Measurement]:
    """The agreed names, of the best adversary and its control; then every arm."""
    best = best_adversary(runs)

    def row(name: str, arm: str, other: str) -> Measurement:
        found = measured(name, difference(runs, arm, other), other, lab.scale)
        return replace(found, unit=f"bits/byte ({arm})")

    found = [
        row("perturbation_minus_kd_bits", best, "kd"),
        row("perturbation_control_minus_kd_bits", CONTROL[best], "kd"),
        row("perturbation_minus_control_bits", best, CONTROL[best]),
    ]
    found += [row(f"perturbation_{arm}_minus_kd_bits", arm, "kd") for arm in ARMS if arm != "kd"]
    bits = {arm: over_seeds([r["bits"] for r in runs[arm]]) for arm in ARMS}
    return found + [
        measured(f"perturbation_{arm}_bits", value, None, lab.scale) for arm, value in bits.items()
    ]


def verdict(values: Mapping[str, Measurement]) -> str:
    """What the worst perturbation did beyond a random one."""
    found, control = (
        values["perturbation_minus_kd_bits"],
        values["perturbation_control_minus_kd_bits"],
    )
    over = values["perturbation_minus_control_bits"]
    longer = values["perturbation_kd_equal_flops_minus_kd_bits"]
    low, high = over.interval or (-1.0, 1.0)
    helps = found.interval is not None and found.interval[1] < 0 and high < 0
    return (
        f"perturbation: the best adversary {found.unit.split('(')[1][:-1]} ends {found.value:+.3f} "
        f"bits/byte from KD, random perturbation of its size {control.value:+.3f}, KD with the "
        f"adversary's FLOPs {longer.value:+.3f}: the search for the worst "
        + ("helps" if helps else "hurts" if low > 0 else "does not help")
    )
