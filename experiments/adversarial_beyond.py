"""Beyond the teacher without an adversary: self-distillation, generations, ensembles, and plain
training that got the same budget.

A small text is read for many epochs, so that a plain run overfits and a teacher's soft targets
regularise. Teachers and students have the same size. Every arm is counted twice: in FLOPs, where
the teachers' training and reading come out of the same budget, and in tokens, where the student
gets the whole budget and its teacher is the best plain model, given.

The settings of each family are chosen on seeds that are not reported, with as many trials each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adversarial_lab import (
    Lab,
    Runs,
    difference,
    measured,
    over_seeds,
    run_config,
    shuffled_batches,
    student_config,
    windows_of,
)

from moe_jax.base.result import Measurement
from moe_jax.objectives.adversarial import State, guess_objective, smoothed_objective, states
from moe_jax.objectives.distillation import DistillConfig, online_objective
from moe_jax.train.step import TrainState

TUNING_SEED = 100
BUDGET = 6
"""FLOPs of an arm in units of beyond_steps plain updates."""
MARK = 0.03 / 0.6931
"""Bits by which a student should be below its teacher and the best plain run (0.03 nats)."""
DROPOUT = (0.0, 0.1, 0.2)
DECAY = (0.1, 1.0)
PLAIN_UNITS = (2.0, BUDGET)
"""Plain runs of a third of the budget, and of all of it."""
ALPHAS = (0.5, 0.8, 1.0)
TEMPERATURES = (1.0, 2.0)


@dataclass(frozen=True)
class Chosen:
    """What tuning found."""

    units: float
    dropout: float
    decay: float
    alpha: float
    temperature: float


class Beyond:
    """One seed's text and the training runs on it."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab, self.seed = lab, seed
        documents, _ = lab.text.draw("pool", lab.scale.beyond_documents, seed)
        self.windows = windows_of(documents)

    def plain(self, units: float, dropout: float, decay: float, seed: int | None = None) -> State:
        """Cross-entropy only."""
        return self._train(units, dropout, decay, seed)

    def taught(self, teachers: list[State], units: float, chosen: Chosen) -> State:
        """Cross-entropy and the mean divergence from teachers."""
        model = student_config()
        settings = DistillConfig(alpha=chosen.alpha, temperature=chosen.temperature)
        objective = online_objective(settings, [model] * len(teachers))
        name = f"taught by {len(teachers)} {settings}"
        return self._train(units, chosen.dropout, chosen.decay, None, name, objective, (teachers,))

    def smoothed(self, units: float, chosen: Chosen) -> State:
        return self._train(
            units, chosen.dropout, chosen.decay, None, "smoothed", smoothed_objective(0.1)
        )

    def guessed(self, teacher: State, units: float, chosen: Chosen) -> State:
        """A teacher without its dark knowledge (adversarial.controls)."""
        objective = guess_objective(chosen.alpha, student_config())
        name = f"guess {chosen.alpha}"
        return self._train(units, chosen.dropout, chosen.decay, None, name, objective, (teacher,))

    def _train(
        self,
        units: float,
        dropout: float,
        decay: float,
        seed: int | None,
        name: str = "plain",
        objective: Any = None,
        more: tuple[Any, ...] = (),
    ) -> State:
        seed = self.seed if seed is None else seed
        model = student_config(dropout=dropout)
        steps = max(1, round(units * self.lab.scale.beyond_steps))
        config = run_config(model, steps, seed, weight_decay=decay)
        given = {} if objective is None else {"objective": objective}
        batches = shuffled_batches(self.windows, seed)
        state: TrainState = self.lab.train(config, batches, name, more=more, **given)
        return states(state)

    def bits(self, state: State) -> dict[str, float]:
        return self.lab.bits(student_config(), state)


def tune(lab: Lab) -> Chosen:
    """The plain settings and the teacher's share and temperature of the lowest loss."""

    def compute() -> dict[str, Any]:
        beyond = Beyond(lab, TUNING_SEED)
        plain = {
            (units, dropout, decay): lab.once(
                f"beyond-tune-{units:g}-{dropout:g}-{decay:g}",
                lambda u=units, d=dropout, w=decay: beyond.bits(beyond.plain(u, d, w)),
            )["bits"]
            for units in PLAIN_UNITS
            for dropout in DROPOUT
            for decay in DECAY
        }
        units, dropout, decay = min(plain, key=lambda key: plain[key])
        teacher: list[State] = []

        def taught(alpha: float, temperature: float) -> dict[str, float]:
            if not teacher:
                teacher.append(beyond.plain(2.0, dropout, decay, seed=TUNING_SEED + 500))
            chosen = Chosen(units, dropout, decay, alpha, temperature)
            return beyond.bits(beyond.taught(teacher, 3.0, chosen))

        soft = {
            (alpha, temperature): lab.once(
                f"beyond-tune-kd-{alpha:g}-{temperature:g}",
                lambda a=alpha, t=temperature: taught(a, t),
            )["bits"]
            for alpha in ALPHAS
            for temperature in TEMPERATURES
        }
        alpha, temperature = min(soft, key=lambda key: soft[key])
        return Chosen(units, dropout, decay, alpha, temperature).__dict__

    return Chosen(**lab.once("beyond-chosen", compute))


Arm = Callable[[Beyond, Chosen], State]


def _teacher(beyond: Beyond, chosen: Chosen, units: float, number: int = 0) -> State:
    """Another start and order than the student's."""
    return beyond.plain(units, chosen.dropout, chosen.decay, seed=beyond.seed + 500 + number)


def _self_kd(beyond: Beyond, chosen: Chosen) -> State:
    """2 units of teacher, 3 updates at 4/3."""
    return beyond.taught([_teacher(beyond, chosen, 2.0)], 3.0, chosen)


def _generations(beyond: Beyond, chosen: Chosen) -> State:
    """2 units of teacher, and two generations of 1.5 updates at 4/3."""
    state = _teacher(beyond, chosen, 2.0)
    for _ in range(2):
        state = beyond.taught([state], 1.5, chosen)
    return state


def _ensemble(beyond: Beyond, chosen: Chosen) -> State:
    """Two teachers of 1.5 units, 1.8 updates at 5/3."""
    teachers = [_teacher(beyond, chosen, 1.5, number) for number in range(2)]
    return beyond.taught(teachers, 1.8, chosen)


def _given_self_kd(beyond: Beyond, chosen: Chosen) -> State:
    return beyond.taught([_teacher(beyond, chosen, chosen.units)], BUDGET, chosen)


def _given_generations(beyond: Beyond, chosen: Chosen) -> State:
    state = _teacher(beyond, chosen, chosen.units)
    for _ in range(2):
        state = beyond.taught([state], BUDGET, chosen)
    return state


def _given_ensemble(beyond: Beyond, chosen: Chosen) -> State:
    teachers = [_teacher(beyond, chosen, chosen.units, number) for number in range(2)]
    return beyond.taught(teachers, BUDGET, chosen)


ARMS: dict[str, Arm] = {
    "plain": lambda b, c: b.plain(c.units, c.dropout, c.decay),
    "plain_untuned": lambda b, c: b.plain(2.0, 0.0, DECAY[0]),
    "reseeded": lambda b, c: _teacher(b, c, c.units, 7),
    "label_smoothing": lambda b, c: b.smoothed(c.units, c),
    "guess_and_uniform": lambda b, c: b.guessed(_teacher(b, c, 2.0), 3.0, c),
    "teacher": lambda b, c: _teacher(b, c, c.units),
    "self_kd": _self_kd,
    "generations": _generations,
    "ensemble": _ensemble,
    "given_self_kd": _given_self_kd,
    "given_generations": _given_generations,
    "given_ensemble": _given_ensemble,
}
TAUGHT = ("self_kd", "generations", "ensemble")


def run(lab: Lab) -> Runs:
    """Every arm, with every seed."""
    chosen = tune(lab)
    runs: Runs = {arm: [] for arm in ARMS}
    for seed in lab.scale.seeds:
        beyond = Beyond(lab, seed)
        for arm, train in ARMS.items():
            runs[arm].append(
                lab.once(
                    f"beyond-{arm}-{seed}",
                    lambda: beyond.bits(train(beyond, chosen)),  # noqa: B023
                )
            )
    return runs


def measurements(runs: Runs, lab: Lab) -> list[Measurement]:
    """Every arm against the tuned plain run and against the teacher."""

    def row(name: str, arm: str, other: str) -> Measurement:
        return measured(name, difference(runs, arm, other), other, lab.scale)

    found = [row(f"beyond_{a}_minus_plain_bits", a, "plain") for a in ARMS if a != "plain"]
    given = [f"given_{a}" for a in TAUGHT]
    found += [row(f"beyond_{a}_minus_teacher_bits", a, "teacher") for a in given]
    for arm in ARMS:
        value = over_seeds([r["bits"] for r in runs[arm]])
        found.append(measured(f"beyond_{arm}_bits", value, None, lab.scale))
    return found


def verdict(values: Mapping[str, Measurement]) -> str:
    """Whether a student without an adversary passes its teacher, and at what cost."""

    def best(names: list[str]) -> tuple[str, Measurement]:
        found = {n: values[f"beyond_{n}_minus_plain_bits"] for n in names}
        name = min(names, key=lambda n: found[n].value or 0.0)
        return name, found[name]

    flops, tokens = best(list(TAUGHT)), best([f"given_{a}" for a in TAUGHT])
    over = values[f"beyond_{tokens[0]}_minus_teacher_bits"]
    passes = over.value is not None and over.value < -MARK and over.interval
    passes = passes and over.interval[1] < 0  # pyright: ignore[reportOptionalSubscript]
    return (
        f"beyond the teacher without an adversary: {tokens[0]} ends {over.value:+.3f} bits/byte "
        f"from its teacher and {tokens[1].value:+.3f} from tuned plain training of the same tokens "
        f"({'passes' if passes else 'misses'} the mark of {-MARK:.2f}); with the teachers' FLOPs "
        f"counted the best, {flops[0]}, ends {flops[1].value:+.3f} from tuned plain training"
    )
