"""lever_distillation with a teacher that others pre-trained: SmolLM2-135M-Instruct on Python text.

    python experiments/distillation_smollm2.py [--out DIR] [--smollm2-seeds N] [--quick]

runs this route alone; lever_distillation.py runs it after its own arms.

The teacher reads a stretch of Python's standard library once, in its own tokens, into a cache of 12
samples a token. Small mixtures of experts over the same 49,152 tokens are trained on that stretch
from scratch, with the cache and without, from the same start on the same batches. The teacher's
reading is counted; its pre-training is not (it is not ours, and it may have seen this text).
"""

import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import numpy as np

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from distillation_arms import Curve, Curves, Settings
from distillation_figures import final, first_below, over_seeds, paired, report, say
from matplotlib.figure import Figure

from moe_jax.base.errors import UserError
from moe_jax.base.files import write_atomically
from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, program
from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TrainConfig,
)
from moe_jax.data.batches import Windows, train_batches
from moe_jax.data.tokens import TokenData, prepare
from moe_jax.distill.cache import CacheConfig, TeacherCache, build_cache, make_outputs
from moe_jax.distill.teacher import Teacher
from moe_jax.distill.upcycle import UpcycleConfig, sparse_config
from moe_jax.interop.gguf import SMOLLM2, find
from moe_jax.model.count import count_parameters, train_flops_per_token
from moe_jax.objectives.distillation import DistillConfig, cached_objective, online_objective
from moe_jax.train.evaluate import make_evaluator
from moe_jax.train.step import init_state, make_step, state_bytes

QUESTION = "What does a published pre-trained teacher give a small mixture of experts?"
LENGTH, BATCH = 128, 2
ALPHA = 0.9
"""Share of the teacher; the rest is cross-entropy with the text."""
POINTS = 6
"""Evaluations of a run."""
CACHE = CacheConfig("sampled", count=12, batch=4, shard=64)
UPCYCLED = UpcycleConfig(experts=4, experts_per_token=2)


ARMS = {"ce": 0.0, "kd": ALPHA}
"""The teacher's share in each arm's loss."""


def data_config(quick: bool) -> DataConfig:
    """Python's standard library; for --quick one package of it, which is tokenised in no time."""
    library = Path(sysconfig.get_paths()["stdlib"])
    source = f"files:{library}/email/*.py" if quick else "stdlib"
    fraction, tokens = (0.2, 512) if quick else (0.02, 12_288)
    return DataConfig(
        source=source, length=LENGTH, validation_fraction=fraction, validation_tokens=tokens
    )


def student_config(vocabulary: int, quick: bool) -> ModelConfig:
    """3.4M parameters, of which 3.1M are the table of tokens: what two cores train in minutes."""
    width = 16 if quick else 64
    return ModelConfig(
        vocabulary=vocabulary,
        width=width,
        layers=1 if quick else 3,
        dense_layers=0 if quick else 1,
        dense_hidden=3 * width,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=width // 4),
        moe=MoEConfig(experts=4, experts_per_token=2, expert_hidden=3 * width // 2),
        tied_embedding=True,
        init_std=0.05,
        unroll=1 if quick else 2,
    )


@dataclass(frozen=True)
class Facts:
    """What is measured of the teacher, once."""

    bits: float
    """Bits per byte on the held-out text."""
    tokens_per_second: float
    """Of its reading into a cache."""
    bytes_per_token: float
    """Of the cache."""


@dataclass
class Route:
    """The teacher, its text, and the runs on it."""

    settings: Settings
    folder: Path

    @property
    def seeds(self) -> list[int]:
        return self.settings.all_seeds()[: self.settings.smollm2_seeds]

    @property
    def tokens(self) -> int:
        return CACHE.batch * LENGTH if self.settings.quick else self.settings.smollm2_tokens

    @cached_property
    def teacher(self) -> Teacher:
        return Teacher.from_gguf(SMOLLM2)

    @cached_property
    def data(self) -> TokenData:
        return prepare(data_config(self.settings.quick), self.teacher.tokenizer)

    @cached_property
    def cache(self) -> TeacherCache:
        text = self.data.train.first(self.tokens + 1)
        return build_cache(self.folder / "smollm2", self.teacher, text, LENGTH, CACHE)

    def config(self, seed: int = 0) -> TrainConfig:
        """The settings of both arms. The learning rate is cross-entropy's best of 3e-3, 6e-3 and
        1.2e-2, on a third of the text with a seed that is not reported."""
        vocabulary = self.teacher.model.vocabulary
        assert vocabulary is not None
        steps = self.tokens // (BATCH * LENGTH)
        return TrainConfig(
            steps=steps,
            batch=BATCH,
            seed=seed,
            evaluate_every=max(2, steps // POINTS),
            model=student_config(vocabulary, self.settings.quick),
            data=data_config(self.settings.quick),
            optim=OptimConfig(learning_rate=3e-3),
        )

    def facts(self) -> Facts:
        """Read, or measured now."""
        path = self.folder / f"smollm2-teacher{'-quick' * self.settings.quick}.json"
        if path.exists():
            return Facts(**json.loads(path.read_text()))
        config = replace(self.config(), model=self.teacher.model)
        evaluate: Callable[[Any], float] = make_evaluator(config, self.data.validation, lambda b: b)
        rate = self._reading_rate(1 if self.settings.quick else 5)
        found = Facts(evaluate(self.teacher), rate, self.cache.bytes_per_token)
        write_atomically(path, json.dumps(found.__dict__) + "\n")
        print(f"SmolLM2: {found.bits:.4f} bits per byte, reads {rate:.0f} tokens/s", flush=True)
        return found

    def _reading_rate(self, repeats: int) -> float:
        """Tokens a second, by the fastest of some calls: other programs slow the rest."""
        windows = Windows(self.data.train, LENGTH, 0, CACHE.batch)
        rows = [windows[index] for index in range(CACHE.batch)]
        inputs = [np.stack([r[k][:LENGTH] for r in rows]) for k in ("tokens", "segments")]
        outputs = make_outputs(self.teacher, CACHE, self.teacher.tokenizer.vocabulary)
        seconds = []
        for _ in range(repeats + 1):  # the first one compiles
            begin = perf_counter()
            jax.block_until_ready(outputs(*inputs, np.arange(CACHE.batch)))  # pyright: ignore
            seconds.append(perf_counter() - begin)
        return CACHE.batch * LENGTH / min(seconds[1:])

    def batches(self, name: str, seed: int) -> Iterator[Any]:
        """Every window once."""
        text = self.data.train.first(self.tokens + 1)
        beside = self.cache if ARMS[name] else None
        return iter(train_batches(text, LENGTH, BATCH, seed, beside=beside))

    def run(self) -> Curves:
        """Every arm with every seed."""
        steps: dict[Any, Any] = {}
        evaluators: dict[Any, Any] = {}
        curves: Curves = {name: [] for name in ARMS}
        for seed in self.seeds:
            for name, found in curves.items():
                found.append(self._curve(name, seed, steps, evaluators))
        return curves

    def _curve(self, name: str, seed: int, steps: dict, evaluators: dict) -> Curve:
        path, config = self.folder / f"smollm2-{name}-{seed}.json", self.config(seed)
        if path.exists():
            found = Curve(**json.loads(path.read_text()))
            if found.steps[-1] == config.steps:
                return found
        if name not in steps:
            settings = DistillConfig(alpha=ARMS[name])
            # Without teachers it is plain cross-entropy, in chunks of the vocabulary.
            plain = online_objective(settings, [])
            objective = cached_objective(settings) if ARMS[name] else plain
            steps[name] = jax.jit(make_step(config, objective))
        if config.model not in evaluators:
            evaluators[config.model] = make_evaluator(config, self.data.validation, lambda b: b)
        found = self._train(config, steps[name], evaluators[config.model], name)
        write_atomically(path, json.dumps(found._asdict()) + "\n")
        print(
            f"seed {seed}  SmolLM2 {name:14} {config.steps:5} updates  {found.bits[-1]:.4f} bits "
            "per byte",
            flush=True,
        )
        return found

    def _train(self, config: TrainConfig, step: Any, evaluate: Any, name: str) -> Curve:
        state, found = init_state(config), Curve([], [])
        more = () if ARMS[name] else ([],)
        batches = self.batches(name, config.seed)
        for index, batch in zip(range(1, config.steps + 1), batches, strict=False):
            state, _ = step(state, batch, *more)
            if index % config.evaluate_every == 0 or index == config.steps:
                found.steps.append(index)
                found.bits.append(evaluate(state))
        return found

    def flops(self) -> tuple[float, float]:
        """Of one token: a student's update, the teacher's reading."""
        student = train_flops_per_token(self.config().model, LENGTH)
        return student, train_flops_per_token(self.teacher.model, LENGTH) / 3


def open_route(settings: Settings, folder: Path) -> Route | None:
    """None, with a line that says why, where the teacher is not here or not wanted."""
    try:
        find(SMOLLM2)
    except UserError as error:
        print(f"the route with SmolLM2 is left out: {error}")
        return None
    if settings.smollm2_seeds == 0:
        print("the route with SmolLM2 is left out: --smollm2-seeds is 0")
        return None
    return Route(settings, folder)


def savings(curves: Curves, route: Route) -> tuple[float, float] | None:
    """Median over seeds: tokens of `ce` over those that `kd` needs to reach its final loss; the
    same in FLOPs, with the teacher's reading of those tokens. None: not reached."""
    own, reading = route.flops()
    found = []
    for taught, plain in zip(curves["kd"], curves["ce"], strict=True):
        needed = first_below(taught, plain.bits[-1])
        if needed is None:
            return None
        found.append(plain.steps[-1] / needed)
    tokens = float(np.median(found))
    return tokens, tokens * own / (own + reading)


def describe(curves: Curves, route: Route) -> list[Measurement]:
    """The route's figures."""
    seeds, unit = route.seeds, "bits per byte"
    tokens, read = savings(curves, route) or (None, None)
    values = final(curves, "kd"), final(curves, "ce")
    rows = [paired("smollm2.kd_minus_ce_bits", *values, "ce", seeds, unit)]
    read_too = "ratio (kd), the teacher's reading too"
    rows += [
        Measurement("smollm2.tokens_to_ce_loss_ratio", tokens, "ratio (kd)", "ce"),
        Measurement("smollm2.flops_to_ce_loss_ratio", read, read_too, "ce"),
    ]
    for arm in curves:
        rows.append(over_seeds(f"smollm2.{arm}.bits", final(curves, arm), unit, seeds))
    return rows + costs(route)


def costs(route: Route) -> list[Measurement]:
    """The teacher's loss and price, and what training all of it as a mixture would take here."""
    facts, (own, reading), config = route.facts(), route.flops(), route.config()
    big = sparse_config(route.teacher.model, UPCYCLED)
    seconds = train_flops_per_token(big, LENGTH) * route.tokens
    seconds /= facts.tokens_per_second * reading
    found = {
        "teacher.bits": (facts.bits, "bits per byte"),
        "teacher.tokens_per_second": (facts.tokens_per_second, "tokens/s into the cache"),
        "teacher.reading_over_student_flops": (reading / own, "ratio a token"),
        "cache_bytes_per_token": (facts.bytes_per_token, "bytes"),
        "tokens": (route.tokens, "tokens that the teacher reads"),
        "student_parameters": (count_parameters(config.model).total, "parameters"),
        "upcycled_hours": (
            seconds / 3600,
            "PREDICTED hours a run on these tokens, at the FLOP/s of the teacher's reading",
        ),
        "upcycled_state_gb": (
            state_bytes(replace(config, model=big)) / 1e9,
            "GB of parameters and moments",
        ),
    }
    return [Measurement(f"smollm2.{name}", *pair) for name, pair in found.items()]


def verdict(found: Mapping[str, Measurement], route: Route | None) -> str:
    """What SmolLM2's advice is worth to a small mixture of experts."""
    if route is None:
        return "the route with SmolLM2 was left out"

    def value(name: str) -> float:
        number = found[f"smollm2.{name}"].value
        assert number is not None
        return float(number)

    tokens, flops = (found[f"smollm2.{n}_to_ce_loss_ratio"].value for n in ("tokens", "flops"))
    saved = (
        "it does not reach the loss of cross-entropy"
        if tokens is None or flops is None
        else f"it is at the other's final loss with {tokens:.2f}x fewer tokens; with the teacher's "
        f"reading counted the other needs {flops:.2f}x its FLOPs (pre-training is not counted)"
    )
    return (
        f"SmolLM2-135M, pre-trained by others and not advanced, stands at "
        f"{value('teacher.bits'):.3f} bits per byte of Python text; a student of "
        f"{value('student_parameters') / 1e6:.1f}M parameters from scratch ends "
        f"{say(found['smollm2.kd_minus_ce_bits'])} from the same one without it when taught by its "
        f"cached samples; {saved}; upcycling the teacher itself takes "
        f"{value('upcycled_state_gb'):.1f} GB of state and {value('upcycled_hours'):.1f} hours a "
        "run here, and was not tried"
    )


def draw(curves: Curves, route: Route) -> Figure:
    """Mean loss of the students over tokens, and over FLOPs with the teacher's reading."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    own, reading = route.flops()
    for index, (name, found) in enumerate(curves.items()):
        tokens = np.array(found[0].steps) * BATCH * LENGTH
        bits = np.array([curve.bits for curve in found])
        cost = own + reading if ARMS[name] else own
        for ax, scale in zip(axes, (1, cost), strict=True):
            ax.plot(tokens * scale, bits.mean(0), "o-", ms=3, color=f"C{index}", label=name)
            ax.fill_between(tokens * scale, bits.min(0), bits.max(0), color=f"C{index}", alpha=0.15)
    for ax in axes:
        ax.axhline(route.facts().bits, color="0.6", ls=":", label="SmolLM2-135M itself")
    axes[0].set(xlabel="tokens that the student reads", ylabel="held-out bits per byte")
    axes[1].set(xlabel="FLOPs, the teacher's reading included", xscale="log")
    axes[0].legend(frameon=False)
    return figure


def main(argv: list[str]) -> None:
    """This route alone."""
    default = Settings(out="runs/distillation_smollm2")
    settings = parse_settings(default, argv, QUESTION)
    if settings.quick:
        settings = replace(settings, seeds=1)
    out = output_folder(settings.out)
    for folder in ("arms", "plots"):
        (out / folder).mkdir(exist_ok=True)
    route = open_route(settings, out / "arms")
    if route is None:
        return
    curves = route.run()
    found = describe(curves, route)
    sentence = verdict({m.name: m for m in found}, route)
    draw(curves, route).savefig(out / "plots" / "smollm2.png", dpi=120)
    write_result(
        out,
        experiment="distillation_smollm2",
        question=QUESTION,
        config=settings,
        measurements=found,
        verdict=sentence,
    )
    report(found)
    print(f"\n{sentence}\n{out}/result.json, plots/")


if __name__ == "__main__":
    program(main)
