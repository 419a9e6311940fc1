"""Adversarial perturbation on top of distillation, beside random perturbation of the same size.

All arms train the same student from the same teacher on the same batches. The perturbed arms read
every batch twice and search for the perturbation. One more arm is therefore plain distillation with
as many FLOPs as virtual adversarial training takes.
"""

from collections.abc import Mapping

from experiments.adversarial.lab import Lab, Method
from experiments.adversarial.settings import run_config, student_config, window_flops
from experiments.adversarial.text import shuffled_batches, windows_of
from moe_jax.base.result import Measurement
from moe_jax.objectives.adversarial import PerturbConfig, perturbed_objective
from moe_jax.study.arms import Runs, run_arms
from moe_jax.study.results import Comparison, interval_of

SIZES = {"": 0.1, "_small": 0.02}
"""Norm of a shift over the norm of the embeddings. The first one was found in pilot runs."""
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
"""For each adversary, the same perturbation without the search for the worst."""


def updates(lab: Lab, arm: str) -> int:
    """The updates of an arm: perturb_steps, or for kd_equal_flops as many as cost the same.

    Virtual training costs 10 forward passes of the student: 3 for the update, 1 for the unshifted
    reading, 3 for the search and 3 for the shifted update. The teacher's reading comes to both.
    """
    if arm != "kd_equal_flops":
        return lab.scale.perturb_steps
    student = window_flops(student_config()) / 3
    teacher = window_flops(lab.teacher_model) / 3
    ratio = (10 * student + teacher) / (3 * student + teacher)
    return round(lab.scale.perturb_steps * ratio)


def train_arm(lab: Lab, arm: str, seed: int) -> dict[str, float]:
    """Bits of an arm's student."""
    config = run_config(student_config(), updates(lab, arm), seed)
    documents, _ = lab.text.draw("pool", lab.scale.pool, seed)
    objective = perturbed_objective(ARMS[arm], lab.teacher_model)
    method = Method(f"perturbed {ARMS[arm]}", objective, (lab.teacher,))
    state = lab.train(config, shuffled_batches(windows_of(documents), seed), method)
    return lab.bits(config.model, state.model_states())


def run(lab: Lab) -> Runs:
    """Every arm with every seed."""
    plan = dict.fromkeys(ARMS, lab.scale.seeds)
    return run_arms(
        lab.store, plan, lambda arm, seed: train_arm(lab, arm, seed), prefix="perturbation-"
    )


def measurements(runs: Runs, lab: Lab) -> list[Measurement]:
    """First the agreed names, of the best adversary and its control. Then every arm.

    The best adversary is the one of the lowest mean loss, a choice that favours adversaries.
    """
    compared = Comparison(runs, lab.scale.seeds)
    best = compared.lowest(CONTROL)
    control = CONTROL[best]
    rows = [
        compared.difference("perturbation_minus_kd_bits", best, "kd", best),
        compared.difference("perturbation_control_minus_kd_bits", control, "kd", control),
        compared.difference("perturbation_minus_control_bits", best, control, best),
    ]
    others = [arm for arm in ARMS if arm != "kd"]
    rows += [
        compared.difference(f"perturbation_{arm}_minus_kd_bits", arm, "kd", arm) for arm in others
    ]
    return rows + [compared.mean(f"perturbation_{arm}_bits", arm) for arm in ARMS]


def verdict(rows: Mapping[str, Measurement]) -> str:
    """Whether the worst perturbation does more than a random one."""
    adversary = rows["perturbation_minus_kd_bits"]
    control = rows["perturbation_control_minus_kd_bits"]
    longer = rows["perturbation_kd_equal_flops_minus_kd_bits"]
    over_control = interval_of(rows["perturbation_minus_control_bits"])
    name = adversary.unit.split("(")[1][:-1]  # "bits/byte (swaps)"
    if interval_of(adversary).high < 0 and over_control.high < 0:
        effect = "helps"
    else:
        effect = "hurts" if over_control.low > 0 else "does not help"
    return (
        f"Perturbation: the best adversary is {name} and ends {adversary.value:+.3f} bits/byte "
        f"from KD. Random perturbation of its size ends {control.value:+.3f} from KD. KD with the "
        f"adversary's FLOPs ends {longer.value:+.3f}. The search for the worst {effect}."
    )
