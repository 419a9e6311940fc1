"""How well does each placement policy guess which experts are needed next, on our own traces?

    python experiments/hot_cold/traces.py [--out DIR] [--quick] [--seed N] [--trace FILE]

Trains a model on code, prose and tables (model.py), records the routing of held-out text whose
domain changes every few hundred tokens, and replays it through every policy at every budget, beside
Belady's optimum. The first fifth of the trace warms the policies up and is not scored. The static
policy counts uses in it. A fitted Zipf-Markov process generates the same trace once more, to show
how far such a process stands in for a recording. `--trace` replays a recorded file instead.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from matplotlib.figure import Figure

from experiments.hot_cold.model import LOCALITY, trained_model
from experiments.hot_cold.replays import (
    BUDGETS,
    Replays,
    best_online,
    replay_all,
    shared_between_domains,
)
from moe_jax.base.console import console
from moe_jax.base.errors import require
from moe_jax.base.paths import user_path
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config.checks import not_negative
from moe_jax.placement.public_traces import open_trace
from moe_jax.placement.synthetic import fit, generate_trace
from moe_jax.placement.trace import Trace, read_trace
from moe_jax.runs.inspect import record_routing
from moe_jax.study.domains import DOMAINS, held_out_texts
from moe_jax.study.results import publish

QUESTION = "How well does each placement policy guess which experts are needed next?"
STRETCH = 1500
"""Characters of one domain before the next."""
MIN_TOKENS = 10
"""A fifth of them warms the policies up."""
MOST_STEPS = 2_000_000
"""Tokens times layers of a replay. A step takes 200 bytes, and a thousandth of a second."""


@dataclass(frozen=True)
class Settings:
    """Replays a routing trace through every placement policy and budget."""

    out: str = "runs/traces"
    """Folder for result.json, the trace, the plots and the trained model."""
    seed: int = 0
    """Seed of the model and of the generated trace."""
    quick: bool = False
    """A smaller model, fewer steps and a shorter trace."""
    locality: float = LOCALITY
    """Weight of the model's locality loss. 0 trains it with DeepSeek-V3's balance alone."""
    trace: str = ""
    """A recorded trace to replay, ours or in a format of placement/public_traces.py. Unset, one is
    recorded here."""
    expert_bytes: int = 0
    """Bytes of one expert, for --trace. Unset, traffic per token is counted in experts."""

    def __post_init__(self) -> None:
        not_negative("", self, "seed", "locality", "expert_bytes")


def recorded_trace(settings: Settings, out: Path) -> tuple[Trace, int]:
    """The trace, and the bytes of one of the model's experts (1 where they are not known)."""
    if settings.trace:
        return replayable(open_trace(user_path(settings.trace))), settings.expert_bytes or 1
    run = trained_model(out, settings.seed, settings.quick, settings.locality)
    path = out / "routing.trace"
    characters = 9_000 if settings.quick else 36_000
    texts = held_out_texts(out, STRETCH, characters)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        recorded = Path(folder) / path.name
        record_routing(run, texts, recorded, domains=DOMAINS)
        recorded.replace(path)  # an earlier trace goes only when there is a new one
    model = run.config.model
    return read_trace(path), 3 * model.width * model.moe.expert_hidden * 4  # float32


def replayable(trace: Trace) -> Trace:
    """The trace, or as much of its beginning as a replay has memory for, which a line says.

    UserError: it is too short to be replayed, or no token uses an expert.
    """
    tokens = len(trace.chosen)
    require(tokens >= MIN_TOKENS, f"the trace has {tokens} tokens: {MIN_TOKENS} are needed")
    most = max(MIN_TOKENS, MOST_STEPS // trace.layers)
    if tokens > most:
        console.print(f"the first {most} of {tokens} tokens are replayed")
        trace = trace.part(0, most)
    require(bool((trace.chosen < trace.experts).any()), "no token of the trace uses an expert")
    experts = trace.layers * trace.experts
    require(experts >= 4, f"the trace has {experts} experts in all layers: 4 are needed")
    return trace


def uses_per_token(trace: Trace) -> float:
    """Distinct experts that a token uses, summed over the layers."""
    return float(np.mean([len(experts) for _, experts in trace.steps()])) * trace.layers


def draw(replays: Replays, uses: float, expert_bytes: int) -> Figure:
    """Hit rate, bytes per token, and hits as a share of Belady's, over the budget."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    share = [100 * budget for budget in BUDGETS]
    names = list(dict.fromkeys(name for name, _ in replays.rates))
    for (name, scope), values in {**replays.rates, ("Belady", ""): replays.belady}.items():
        look: dict[str, Any] = {"ls": "--" if scope == "quota" else "-", "marker": "."}
        look["color"] = f"C{names.index(name)}" if scope else "k"
        panels[0].plot(share, values, label=f"{name}, {scope}".strip(", "), **look)
        panels[1].plot(share, [(1 - v) * uses * expert_bytes / 1e6 for v in values], **look)
        parts = [v / max(b, 1e-9) for v, b in zip(values, replays.belady, strict=True)]
        panels[2].plot(share, parts, **look)
    unit = "MB" if expert_bytes > 1 else "million experts"
    labels = ("hit rate", f"{unit} per token", "hits of Belady's")
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xlabel="resident experts, %", ylabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def rate_measurements(replays: Replays, seed: int) -> list[Measurement]:
    """The hit rate of every policy, scope and budget."""
    return [
        Measurement(
            f"hit_rate_{name}_{scope}_at_{budget:.0%}".rstrip("%"),
            value,
            "fraction",
            "Belady",
            value / max(best, 1e-9),
            [seed],
        )
        for (name, scope), values in replays.rates.items()
        for budget, value, best in zip(BUDGETS, values, replays.belady, strict=True)
    ]


def best_measurements(
    replays: Replays, uses: float, expert_bytes: int, seed: int
) -> list[Measurement]:
    """Belady's hit rate, and hits and bytes of the best online policy, at every budget."""
    rows = []
    for index, budget in enumerate(BUDGETS):
        name, scope = best_online(replays.rates, index)
        best = replays.rates[name, scope][index]
        bound = replays.belady[index]
        label = f"{budget:.0%}".rstrip("%")
        of_bound = best / max(bound, 1e-9)
        moved = (1 - best) * uses * expert_bytes
        unit = f"fraction ({name}, {scope})"
        hits = f"hits_of_belady_best_online_at_{label}"
        rows += [
            Measurement(f"hit_rate_belady_at_{label}", bound, "fraction", seeds=[seed]),
            Measurement(hits, of_bound, unit, "Belady", seeds=[seed]),
            Measurement(f"bytes_per_token_best_online_at_{label}", moved, "bytes", seeds=[seed]),
        ]
    return rows


def synthetic_measurements(trace: Trace, replays: Replays, seed: int) -> list[Measurement]:
    """The fitted Zipf-Markov process, and how far its hit rates are from the recording's."""
    fitted = fit(trace)
    other = replay_all(generate_trace(fitted, len(trace.chosen), seed))
    errors = [
        abs(a - b)
        for key, values in replays.rates.items()
        for a, b in zip(values, other.rates[key], strict=True)
    ]
    return [
        *(
            Measurement(f"zipf_markov_{name}", float(getattr(fitted, name)), "", seeds=[seed])
            for name in ("exponent", "repeat", "switch")
        ),
        Measurement("zipf_markov_hit_rate_error", float(np.mean(errors)), "mean absolute"),
    ]


def verdict(values: Mapping[str, float | int | None]) -> str:
    """The answer, in sentences."""
    shares = ", ".join(
        f"{values[f'hits_of_belady_best_online_at_{round(100 * b)}']:.0%} with {b:.0%}"
        for b in BUDGETS
    )
    return (
        f"The best online policy has this share of Belady's hits, by resident experts: {shares}. "
        f"With 25% resident, the hit rate of static is {values['hit_rate_static_pool_at_25']:.0%}, "
        f"of lru {values['hit_rate_lru_pool_at_25']:.0%}, of Belady "
        f"{values['hit_rate_belady_at_25']:.0%}."
    )


def main(argv: list[str]) -> None:
    """Records, replays, draws, writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    trace, expert_bytes = recorded_trace(settings, out)
    replays = replay_all(trace)
    uses = uses_per_token(trace)
    measurements = [
        *rate_measurements(replays, settings.seed),
        *best_measurements(replays, uses, expert_bytes, settings.seed),
        *synthetic_measurements(trace, replays, settings.seed),
        Measurement("hot_experts_shared_between_domains", shared_between_domains(trace), "share"),
        Measurement("tokens", len(trace.chosen), "tokens"),
    ]
    publish(
        out,
        experiment="traces",
        question=QUESTION,
        settings=settings,
        measurements=measurements,
        verdict=verdict({m.name: m.value for m in measurements}),
        figures={"traces": draw(replays, uses, expert_bytes)},
    )


if __name__ == "__main__":
    program(main)
