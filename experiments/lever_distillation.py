"""Does a pre-trained teacher make a mixture-of-experts student cheaper, or better than itself?

    python experiments/lever_distillation.py [--out DIR] [--seeds N] [--steps N] [--quick]

For each seed a dense teacher is trained on the text of Python's standard library, byte by byte, and
then every arm on the same batches in the same order: students from scratch with and without the
teacher, students upcycled from it (Komatsuzaki et al., arXiv:2212.05055) with and without it, a
dense student of the teacher's own size (Furlanello et al., arXiv:1805.04770), and plain training
given as many FLOPs as teacher and student together. The arms of a seed that are finished are read,
not repeated.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_jax.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

import jax
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from moe_jax.cli import parse_settings, program
from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
    require,
)
from moe_jax.data.batches import train_batches
from moe_jax.data.tokens import TokenData, prepare
from moe_jax.distill.upcycle import UpcycleConfig, sparse_config, upcycle
from moe_jax.files import write_atomically
from moe_jax.model.count import train_flops_per_token
from moe_jax.result import Measurement, output_folder, write_result
from moe_jax.train.distillation import DistillConfig, online_objective
from moe_jax.train.evaluate import make_evaluator
from moe_jax.train.optimizer import make_optimizer
from moe_jax.train.step import TrainState, init_state, make_step

QUESTION = "What does a teacher save a mixture-of-experts student, its own cost counted?"
UPCYCLE = UpcycleConfig(experts=4, experts_per_token=2, noise=0.01)
POINTS = 10
"""Evaluations of a run."""


@dataclass(frozen=True)
class Settings:
    """Trains teachers and students in pairs and compares tokens, FLOPs and held-out bits."""

    out: str = "runs/lever_distillation"
    """Folder for result.json, plots and the finished arms."""
    seed: int = 0
    """The first seed."""
    seeds: int = 5
    """Seeds, one after the other from `seed`."""
    steps: int = 300
    """Updates of a student."""
    teacher_steps: int = 600
    """Updates of a teacher, and of the dense student of its size."""
    quick: bool = False
    """One seed, 10 updates."""

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "teacher_steps"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}: it must be positive")


@dataclass(frozen=True)
class Arm:
    """One way to spend the tokens."""

    start: Literal["random", "teacher", "upcycled"] = "random"
    sparse: bool = True
    alpha: float = 0.0
    """Share of the teacher in the loss."""
    length: Literal["student", "teacher", "equal FLOPs"] = "student"
    """Whose number of updates; or the FLOPs of teacher and student together."""
    dropout: float = 0.0


ARMS = {
    "teacher": Arm(sparse=False, length="teacher"),
    "scratch": Arm(),
    "scratch_dropout": Arm(dropout=0.1),
    "scratch_equal_flops": Arm(length="equal FLOPs"),
    "continued": Arm(start="teacher", sparse=False),
    "upcycled": Arm(start="upcycled"),
    "kd": Arm(alpha=0.5),
    "kd_alone": Arm(alpha=1.0),
    "upcycled_kd": Arm(start="upcycled", alpha=0.5),
    "self_kd": Arm(sparse=False, alpha=0.5, length="teacher"),
}
TAUGHT = tuple(name for name, arm in ARMS.items() if arm.alpha > 0)
PLAIN = tuple(name for name, arm in ARMS.items() if arm.alpha == 0 and name != "teacher")


class Curve(NamedTuple):
    """Held-out bits per byte after so many updates."""

    steps: list[int]
    bits: list[float]


Curves = dict[str, list[Curve]]
"""For each arm, one for each seed."""


def teacher_config() -> TrainConfig:
    """A dense model of 0.2M parameters on bytes."""
    model = ModelConfig(
        width=64,
        layers=3,
        dense_layers=3,
        dense_hidden=192,
        attention=AttentionConfig(kind="gqa", heads=4, kv_heads=2, head_dim=16),
        moe=MoEConfig(experts=4, experts_per_token=2),
        init_std=0.06,
        unroll=3,
    )
    data = DataConfig(
        tokenizer="bytes", length=128, validation_fraction=0.03, validation_tokens=30_000
    )
    return TrainConfig(batch=16, model=model, data=data, optim=OptimConfig(learning_rate=3e-3))


def flops_per_token(arm: Arm, config: TrainConfig) -> float:
    """Of an update of the arm, a third of a teacher's update (its forward pass) included."""
    length, teacher = config.data.length, teacher_config()
    reading = train_flops_per_token(teacher.resolved_model(), length) / 3 if arm.alpha else 0.0
    return train_flops_per_token(config.resolved_model(), length) + reading


def updates(arm: Arm, settings: Settings, config: TrainConfig) -> int:
    """How many updates an arm gets."""
    if arm.length != "equal FLOPs":
        return settings.steps if arm.length == "student" else settings.teacher_steps
    teacher = teacher_config()
    own = flops_per_token(arm, config)
    spent = settings.teacher_steps * flops_per_token(ARMS["teacher"], teacher)
    return round((spent + settings.steps * flops_per_token(Arm(alpha=1), config)) / own)


def arm_config(name: str, settings: Settings) -> TrainConfig:
    """The model and schedule of an arm."""
    arm, config = ARMS[name], teacher_config()
    model = sparse_config(config.model, UPCYCLE) if arm.sparse else config.model
    config = replace(config, model=replace(model, dropout=arm.dropout))
    steps = updates(arm, settings, config)
    return replace(config, steps=steps, evaluate_every=max(5, steps // POINTS))


class Runner:
    """Trains arms; a step is compiled once for all seeds, and for the arms that share it."""

    def __init__(self, settings: Settings, data: TokenData, folder: Path) -> None:
        self.settings, self.data, self.folder = settings, data, folder
        self._teachers: dict[int, TrainState] = {}
        self._steps: dict[Any, Callable[..., Any]] = {}
        self._evaluators: dict[Any, Callable[..., float]] = {}

    def curve(self, name: str, seed: int) -> Curve:
        """An arm's curve, read if it is there for the same number of updates."""
        path = self.folder / f"{name}-{seed}.json"
        steps = arm_config(name, self.settings).steps
        if path.exists():
            found = Curve(**json.loads(path.read_text()))
            if found.steps[-1] == steps:
                return found
        found, _ = self._train(name, seed)
        write_atomically(path, json.dumps(found._asdict()) + "\n")
        print(f"seed {seed}  {name:20} {steps:5} updates  {found.bits[-1]:.4f} bits per byte")
        return found

    def _teacher(self, seed: int) -> TrainState:
        """Trained again after a restart: that costs seconds, and gives the same bits."""
        if seed not in self._teachers:
            self._teachers = {seed: self._train("teacher", seed)[1]}
        return self._teachers[seed]

    def _programs(self, arm: Arm, config: TrainConfig) -> Any:
        """(step, evaluator)"""
        key = replace(config, seed=0), arm.alpha
        if key not in self._steps:
            more: Any = ()
            if arm.alpha:
                objective = DistillConfig(alpha=arm.alpha, chunk=256)
                more = (online_objective(objective, [teacher_config().resolved_model()]),)
            self._steps[key] = jax.jit(make_step(config, *more))
        plain = replace(config.model, dropout=0.0)
        if plain not in self._evaluators:
            evaluator = make_evaluator(config, self.data.validation, lambda b: b)
            self._evaluators[plain] = evaluator
        return self._steps[key], self._evaluators[plain]

    def _start(self, arm: Arm, config: TrainConfig) -> TrainState:
        state = init_state(config)
        if arm.start == "random":
            return state
        parameters, router = self._teacher(config.seed).parameters, state.router
        if arm.start == "upcycled":
            _, parameters, router = upcycle(teacher_config().resolved_model(), parameters, UPCYCLE)
        optimizer = make_optimizer(config.optim, config.steps).init(parameters)
        return state._replace(parameters=parameters, router=router, optimizer=optimizer)

    def _train(self, name: str, seed: int) -> tuple[Curve, TrainState]:
        arm, config = ARMS[name], replace(arm_config(name, self.settings), seed=seed)
        step, evaluate = self._programs(arm, config)
        state, more = self._start(arm, config), ()
        if arm.alpha:
            teacher = self._teacher(seed)
            more = ([(teacher.parameters, teacher.router)],)
        # The teacher reads other text than its students: they learn what it knows, not its order.
        order = seed + 1000 if name == "teacher" else seed
        batches = train_batches(self.data.train, config.data.length, config.batch, order)
        found = Curve([], [])
        for index, batch in zip(range(1, config.steps + 1), batches, strict=False):
            state, _ = step(state, batch, *more)
            if index % config.evaluate_every == 0 or index == config.steps:
                found.steps.append(index)
                found.bits.append(evaluate(state))
        require(bool(np.isfinite(found.bits[-1])), f"{name}, seed {seed}: the loss is not finite")
        return found, state


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
    return np.array([curve.bits[-1] for curve in curves[name]])


def lowest(curves: Curves, names: tuple[str, ...]) -> str:
    """The arm of the lowest mean loss."""
    return min(names, key=lambda name: float(final(curves, name).mean()))


def savings(curves: Curves, settings: Settings, name: str) -> tuple[float, float, float] | None:
    """Of an arm, the median over seeds: scratch's tokens over those needed to reach its final loss;
    the same in FLOPs with the teacher's reading, and with its training too. None: not reached."""
    arm, config = ARMS[name], arm_config(name, settings)
    scratch = arm_config("scratch", settings)
    teaching = settings.teacher_steps * flops_per_token(ARMS["teacher"], teacher_config())
    own, base = flops_per_token(arm, config), flops_per_token(ARMS["scratch"], scratch)
    found = []
    for curve, plain in zip(curves[name], curves["scratch"], strict=True):
        needed = first_below(curve, plain.bits[-1])
        if needed is None:
            return None
        spent = needed * own
        whole = scratch.steps * base
        found.append((scratch.steps / needed, whole / spent, whole / (spent + teaching)))
    tokens, read, taught = np.median(found, axis=0)
    return float(tokens), float(read), float(taught)


def describe(curves: Curves, settings: Settings, seeds: list[int]) -> list[Measurement]:
    """The figures, those with agreed names first."""
    routes = tuple(n for n in TAUGHT if ARMS[n].sparse)
    saved = {name: savings(curves, settings, name) for name in (*routes, "upcycled")}
    reached = [name for name in routes if saved[name]]
    fastest = max(reached, key=lambda name: saved[name][0]) if reached else None  # pyright: ignore
    tokens, read, taught = saved[fastest] or (None,) * 3 if fastest else (None,) * 3
    best, plain = lowest(curves, TAUGHT), lowest(curves, PLAIN)
    rows: list[Measurement] = [
        Measurement("tokens_to_scratch_loss_ratio", tokens, f"ratio ({fastest})", "scratch"),
        Measurement(
            "flops_to_scratch_loss_ratio", taught, f"ratio ({fastest}), all FLOPs", "scratch"
        ),
        Measurement(
            "flops_to_scratch_loss_ratio_teacher_given", read, f"ratio ({fastest})", "scratch"
        ),
    ]

    def difference(name: str, one: str, other: str) -> None:
        mean, bounds = interval((final(curves, one) - final(curves, other)).tolist())
        unit = f"bits per byte ({one})"
        rows.append(Measurement(name, mean, unit, other, seeds=seeds, interval=bounds))

    difference("student_minus_teacher_bits", best, "teacher")
    difference("student_minus_best_plain_bits", best, plain)
    difference("upcycled_kd_minus_upcycled_bits", "upcycled_kd", "upcycled")
    difference("kd_minus_scratch_bits", "kd", "scratch")
    difference("self_kd_minus_teacher_bits", "self_kd", "teacher")
    for name, found in saved.items():
        value = found[0] if found else None
        rows.append(Measurement(f"{name}.tokens_to_scratch_loss_ratio", value, "ratio", "scratch"))
    for name in ARMS:
        mean, bounds = interval(final(curves, name).tolist())
        rows.append(
            Measurement(f"{name}.bits", mean, "bits per byte", seeds=seeds, interval=bounds)
        )
    return rows


def verdict(found: Mapping[str, Measurement]) -> str:
    """What held of the article's sentence."""
    tokens, all_flops = (found[f"{n}_to_scratch_loss_ratio"].value for n in ("tokens", "flops"))

    def say(name: str) -> str:
        m = found[name]
        assert m.value is not None
        if m.interval is None:
            return f"{m.value:+.3f} (one seed)"
        sure = m.interval[1] < 0 or m.interval[0] > 0
        return f"{m.value:+.3f} ({'' if sure else 'not '}significant)"

    saved = (
        "no taught student reached the loss of the one from scratch"
        if tokens is None or all_flops is None
        else f"a taught student reaches the loss of one from scratch with {tokens:.1f}x fewer "
        f"tokens of its own; with the teacher's training counted the one from scratch needs "
        f"{all_flops:.2f}x the FLOPs of the taught one"
    )
    return (
        f"{saved}; against its teacher the best student stands at "
        f"{say('student_minus_teacher_bits')} bits per byte, against the best training without a "
        f"teacher's advice ({found['student_minus_best_plain_bits'].baseline}) at "
        f"{say('student_minus_best_plain_bits')}; the teacher's advice adds "
        f"{say('upcycled_kd_minus_upcycled_bits')} to upcycling and {say('kd_minus_scratch_bits')} "
        "to training from scratch; models of 0.2M to 0.5M parameters on bytes, one corpus"
    )


def draw(curves: Curves, settings: Settings) -> Figure:
    """Mean loss over tokens, and over FLOPs with the teacher's."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    teaching = settings.teacher_steps * flops_per_token(ARMS["teacher"], teacher_config())
    for index, (name, found) in enumerate(curves.items()):
        arm, config = ARMS[name], arm_config(name, settings)
        tokens = config.batch * config.data.length
        steps, bits = np.array(found[0].steps), np.mean([c.bits for c in found], axis=0)
        needs = teaching if arm.alpha or arm.start != "random" else 0.0
        line = "--" if arm.alpha == 0 else "-"
        left.plot(steps * tokens, bits, line, color=f"C{index}", label=name)
        spent = (steps * flops_per_token(arm, config) + needs) * tokens
        right.plot(spent, bits, line, color=f"C{index}")
    left.set(xlabel="tokens that the student reads", ylabel="held-out bits per byte")
    right.set(xlabel="FLOPs, the teacher's training and reading included")
    low = min(float(final(curves, name).mean()) for name in curves)
    left.set_ylim(low - 0.1, low + 1.5)
    left.legend(frameon=False, fontsize=8)
    return figure


def main(argv: list[str]) -> None:
    """Trains what is not there, compares, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    if settings.quick:
        settings = replace(settings, seeds=1, steps=10, teacher_steps=10)
    out = output_folder(settings.out)
    (out / "arms").mkdir(exist_ok=True)
    (out / "plots").mkdir(exist_ok=True)
    seeds = [settings.seed + index for index in range(settings.seeds)]
    runner = Runner(settings, prepare(teacher_config().data), out / "arms")
    curves: Curves = {name: [] for name in ARMS}
    for seed in seeds:
        for name in ARMS:
            curves[name].append(runner.curve(name, seed))
    found = describe(curves, settings, seeds)
    sentence = verdict({m.name: m for m in found})
    draw(curves, settings).savefig(out / "plots" / "loss.png", dpi=120)
    write_result(
        out,
        experiment="lever_distillation",
        question=QUESTION,
        config=settings,
        measurements=found,
        verdict=sentence,
    )
    for m in found:
        value = "not reached" if m.value is None else f"{m.value:.4g}"
        bounds = "" if m.interval is None else f"  [{m.interval[0]:.4g}, {m.interval[1]:.4g}]"
        print(f"{m.name:44} {value:>12} {m.unit}{bounds}")
    print(f"\n{sentence}\n{out}/result.json, plots/loss.png")


if __name__ == "__main__":
    program(main)
