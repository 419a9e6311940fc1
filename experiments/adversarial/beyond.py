"""Beyond the teacher without an adversary: self-distillation, generations, ensembles, and plain
training that gets the same budget.

A small text is read for many epochs, so that a plain run overfits and a teacher's soft targets
regularise. Teachers and students have the same size. Every arm is counted twice. In FLOPs, the
teachers' training and reading come out of the same budget. In tokens (the arms named given_…), the
student gets the whole budget and its teacher is the best plain model.

The settings of each family are chosen on seeds that are not reported, with as many trials each.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from typing import Any

from experiments.adversarial.lab import PLAIN, Lab, Method
from experiments.adversarial.settings import run_config, student_config
from experiments.adversarial.text import shuffled_batches, windows_of
from moe_jax.base.result import Measurement
from moe_jax.config import DistillConfig
from moe_jax.objectives.adversarial import guess_objective, smoothed_objective
from moe_jax.objectives.distillation import States, online_objective
from moe_jax.study.arms import Runs, run_arms
from moe_jax.study.results import Comparison, interval_of

TUNING_SEED = 100
OTHER_START = 500
"""Added to a student's seed for its teacher: another start and another order of the text."""
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
class Regime:
    """How long a run is, and what keeps it from overfitting."""

    units: float
    """Updates, in units of beyond_steps."""
    dropout: float
    decay: float


@dataclass(frozen=True)
class Chosen:
    """What tuning chose: the plain regime, and the teacher's share and temperature."""

    units: float
    dropout: float
    decay: float
    alpha: float
    temperature: float

    def regime(self, units: float) -> Regime:
        """The plain regime for another length."""
        return Regime(units, self.dropout, self.decay)


class Trainer:
    """One seed's text and the training runs on it."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab = lab
        self.seed = seed
        documents, _ = lab.text.draw("pool", lab.scale.beyond_documents, seed)
        self.windows = windows_of(documents)

    def train(self, regime: Regime, method: Method = PLAIN, seed: int | None = None) -> States:
        """A model of the students' size, from `seed` or the trainer's own."""
        seed = self.seed if seed is None else seed
        model = student_config(dropout=regime.dropout)
        steps = max(1, round(regime.units * self.lab.scale.beyond_steps))
        config = run_config(model, steps, seed, weight_decay=regime.decay)
        return self.lab.train(config, shuffled_batches(self.windows, seed), method).model_states()

    def teacher(self, regime: Regime, number: int = 0) -> States:
        """A plain run with another start and order than the student's."""
        return self.train(regime, seed=self.seed + OTHER_START + number)

    def taught(self, teachers: list[States], units: float, chosen: Chosen) -> States:
        """Cross-entropy and the mean divergence from the teachers."""
        settings = DistillConfig(alpha=chosen.alpha, temperature=chosen.temperature)
        objective = online_objective(settings, [student_config()] * len(teachers))
        method = Method(f"taught by {len(teachers)} {settings}", objective, (teachers,))
        return self.train(chosen.regime(units), method)

    def smoothed(self, chosen: Chosen) -> States:
        """Label smoothing: soft targets without a teacher."""
        method = Method("smoothed", smoothed_objective(0.1))
        return self.train(chosen.regime(chosen.units), method)

    def guessed(self, teacher: States, units: float, chosen: Chosen) -> States:
        """A teacher without its dark knowledge (adversarial.controls)."""
        objective = guess_objective(chosen.alpha, student_config())
        method = Method(f"guess {chosen.alpha}", objective, (teacher,))
        return self.train(chosen.regime(units), method)

    def bits(self, state: States) -> dict[str, float]:
        return self.lab.bits(student_config(), state)


def tune(lab: Lab) -> Chosen:
    """The plain regime and the teacher's share and temperature of the lowest loss."""

    def choose() -> dict[str, Any]:
        trainer = Trainer(lab, TUNING_SEED)
        regimes = [Regime(*values) for values in product(PLAIN_UNITS, DROPOUT, DECAY)]
        plain = min(regimes, key=lambda regime: _plain_bits(trainer, regime))
        # Many taught trials share the teacher, and none needs it if all of them are finished.
        teacher = lru_cache(lambda: trainer.teacher(Regime(2.0, plain.dropout, plain.decay)))
        candidates = [Chosen(**asdict(plain), alpha=a, temperature=t) for a, t in _soft_targets()]
        return asdict(min(candidates, key=lambda c: _taught_bits(trainer, teacher, c)))

    return Chosen(**lab.store.once("beyond-chosen", choose))


def _soft_targets() -> list[tuple[float, float]]:
    return list(product(ALPHAS, TEMPERATURES))


def _plain_bits(trainer: Trainer, regime: Regime) -> float:
    name = f"beyond-tune-{regime.units:g}-{regime.dropout:g}-{regime.decay:g}"
    return trainer.lab.store.once(name, lambda: trainer.bits(trainer.train(regime)))["bits"]


def _taught_bits(trainer: Trainer, teacher: Callable[[], States], chosen: Chosen) -> float:
    def train() -> dict[str, float]:
        return trainer.bits(trainer.taught([teacher()], 3.0, chosen))

    name = f"beyond-tune-kd-{chosen.alpha:g}-{chosen.temperature:g}"
    return trainer.lab.store.once(name, train)["bits"]


Arm = Callable[[Trainer, Chosen], States]


def _plain(trainer: Trainer, chosen: Chosen) -> States:
    return trainer.train(chosen.regime(chosen.units))


def _reseeded(trainer: Trainer, chosen: Chosen) -> States:
    """Plain training with another start: how much the start alone changes."""
    return trainer.teacher(chosen.regime(chosen.units), 7)


def _given_teacher(trainer: Trainer, chosen: Chosen, number: int = 0) -> States:
    """The best plain model, as the given_… arms have it."""
    return trainer.teacher(chosen.regime(chosen.units), number)


# An update of a student that reads n teachers costs 1 + n/3 plain ones: a forward pass is a third.


def _self_kd(trainer: Trainer, chosen: Chosen) -> States:
    """2 units of teacher, 3 units of updates at 4/3."""
    return trainer.taught([trainer.teacher(chosen.regime(2.0))], 3.0, chosen)


def _generations(trainer: Trainer, chosen: Chosen) -> States:
    """2 units of teacher, and two generations of 1.5 units of updates at 4/3."""
    state = trainer.teacher(chosen.regime(2.0))
    for _ in range(2):
        state = trainer.taught([state], 1.5, chosen)
    return state


def _ensemble(trainer: Trainer, chosen: Chosen) -> States:
    """Two teachers of 1.5 units, 1.8 units of updates at 5/3."""
    teachers = [trainer.teacher(chosen.regime(1.5), number) for number in range(2)]
    return trainer.taught(teachers, 1.8, chosen)


def _guess_and_uniform(trainer: Trainer, chosen: Chosen) -> States:
    return trainer.guessed(trainer.teacher(chosen.regime(2.0)), 3.0, chosen)


def _given_self_kd(trainer: Trainer, chosen: Chosen) -> States:
    return trainer.taught([_given_teacher(trainer, chosen)], BUDGET, chosen)


def _given_generations(trainer: Trainer, chosen: Chosen) -> States:
    state = _given_teacher(trainer, chosen)
    for _ in range(2):
        state = trainer.taught([state], BUDGET, chosen)
    return state


def _given_ensemble(trainer: Trainer, chosen: Chosen) -> States:
    teachers = [_given_teacher(trainer, chosen, number) for number in range(2)]
    return trainer.taught(teachers, BUDGET, chosen)


ARMS: dict[str, Arm] = {
    "plain": _plain,
    "plain_untuned": lambda trainer, _: trainer.train(Regime(2.0, 0.0, DECAY[0])),
    "reseeded": _reseeded,
    "label_smoothing": lambda trainer, chosen: trainer.smoothed(chosen),
    "guess_and_uniform": _guess_and_uniform,
    "teacher": _given_teacher,
    "self_kd": _self_kd,
    "generations": _generations,
    "ensemble": _ensemble,
    "given_self_kd": _given_self_kd,
    "given_generations": _given_generations,
    "given_ensemble": _given_ensemble,
}
TAUGHT = ("self_kd", "generations", "ensemble")
GIVEN = tuple(f"given_{arm}" for arm in TAUGHT)


def run(lab: Lab) -> Runs:
    """Every arm with every seed."""
    chosen = tune(lab)
    trainer_of = lru_cache(1)(partial(Trainer, lab))  # seeds are the outer loop: one is enough

    def run_one(arm: str, seed: int) -> dict[str, float]:
        trainer = trainer_of(seed)
        return trainer.bits(ARMS[arm](trainer, chosen))

    return run_arms(lab.store, dict.fromkeys(ARMS, lab.scale.seeds), run_one, prefix="beyond-")


def measurements(runs: Runs, lab: Lab) -> list[Measurement]:
    """Every arm against the tuned plain run, and the given_… arms against the teacher."""
    compared = Comparison(runs, lab.scale.seeds)
    others = [arm for arm in ARMS if arm != "plain"]
    rows = [compared.difference(f"beyond_{a}_minus_plain_bits", a, "plain") for a in others]
    rows += [compared.difference(f"beyond_{a}_minus_teacher_bits", a, "teacher") for a in GIVEN]
    return rows + [compared.mean(f"beyond_{arm}_bits", arm) for arm in ARMS]


def verdict(rows: Mapping[str, Measurement]) -> str:
    """Whether a student without an adversary passes its teacher, and at what cost."""

    def over_plain(arm: str) -> float:
        return interval_of(rows[f"beyond_{arm}_minus_plain_bits"]).mean

    counted = min(TAUGHT, key=over_plain)
    given = min(GIVEN, key=over_plain)
    over_teacher = interval_of(rows[f"beyond_{given}_minus_teacher_bits"])
    passes = over_teacher.mean < -MARK and over_teacher.high < 0
    return (
        f"Beyond the teacher without an adversary: {given} ends {over_teacher.mean:+.3f} bits/byte "
        f"from its teacher and {'passes' if passes else 'misses'} the mark of {-MARK:.2f}. It ends "
        f"{over_plain(given):+.3f} from tuned plain training on the same tokens. With the "
        f"teachers' FLOPs counted, the best is {counted}, which ends {over_plain(counted):+.3f} "
        "from tuned plain training."
    )
