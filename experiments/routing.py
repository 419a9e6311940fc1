"""Where does a mixture of experts send its tokens, and do experts belong to domains?

    python experiments/routing.py --model MODEL [--text FILE FILE …] --out DIR

MODEL is the --out of a run, a folder of safetensors, or hf:OWNER/NAME. Every --text is a domain.
Without --text the domains are code, prose and tables from Python's own standard library. DIR gets a
heat map, the tokens of each expert (tokens.json), and routing.trace, which the placement
experiments replay (--trace).
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_jax.base.startup import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()

from moe_jax.base.errors import reading
from moe_jax.base.files import disk_errors, write_atomically
from moe_jax.base.paths import user_path
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.config import require
from moe_jax.config.checks import positive
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.placement.trace import Trace, read_trace
from moe_jax.runs.inspect import Routed, routed_windows, write_trace
from moe_jax.runs.weights import load_weights
from moe_jax.study.domains import DOMAINS, held_out_texts, write_corpus
from moe_jax.study.results import publish
from moe_jax.study.routing import (
    by_chance,
    plot_shares,
    shares_by_domain,
    specialisation,
    top_tokens,
)

QUESTION = "Do the experts belong to domains?"
STRETCH = 8_000


@dataclass(frozen=True)
class Settings:
    """Shows where a model sends the tokens of texts."""

    model: str = ""
    """A run, a folder of safetensors, or hf:OWNER/NAME, with mixture-of-experts blocks."""
    text: tuple[str, ...] = ()
    """UTF-8 files. Each is a domain. Unset: code, prose and tables of the standard library."""
    out: str = "runs/routing"
    """Folder of result.json, the plot, tokens.json and routing.trace."""
    context: int = 256
    """Tokens of a window. What is left of a text after its whole windows is not read."""
    top: int = 10
    """Tokens listed for each expert."""
    least: int = 5
    """Tokens with fewer occurrences are not listed."""
    quick: bool = False
    """A sixth of the standard library's text, for a look."""

    def __post_init__(self) -> None:
        positive("", self, "context", "top", "least")
        distinct = len(set(self.text)) == len(self.text)
        require(distinct, "text names a file twice: each file is a domain")


def texts_of(settings: Settings, out: Path) -> list[tuple[str, str]]:
    """(domain, text) pairs. UserError: a file that cannot be read as UTF-8."""
    if not settings.text:
        write_corpus(out)
        return list(held_out_texts(out, STRETCH, (3 if settings.quick else 18) * STRETCH))
    found = []
    for name in settings.text:
        path = user_path(name)
        with reading(path, "give text files in UTF-8"):
            found.append((name, path.read_text(encoding="utf-8")))
    return found


def record(settings: Settings, out: Path) -> tuple[Trace, np.ndarray, Tokenizer]:
    """The trace, also in out/routing.trace, its tokens, and the model's tokenizer."""
    texts = texts_of(settings, out)  # before the model, which may take minutes
    model = load_weights(settings.model)
    tokens: list[np.ndarray] = []

    def kept() -> Iterator[Routed]:
        for window in routed_windows(model, texts, settings.context):
            tokens.append(window.tokens)
            yield window

    path = out / "routing.trace"
    with disk_errors(out), tempfile.TemporaryDirectory(dir=out) as folder:
        recorded = Path(folder) / path.name
        experts = model.model.moe.experts
        domains = settings.text or DOMAINS
        write_trace(kept(), recorded, experts=experts, domains=domains, note=settings.model)
        trace = read_trace(recorded)
        for number, domain in enumerate(domains):
            # A domain without a use would count as one that differs from all others.
            require(
                number in trace.domain,
                f"{domain} has fewer than context={settings.context} tokens: give a longer text, "
                "or a smaller --context",
            )
        recorded.replace(path)  # an earlier trace goes only when there is a new one
    return trace, np.concatenate(tokens), model.tokenizer


def listed_tokens(
    trace: Trace, tokens: np.ndarray, tokenizer: Tokenizer, settings: Settings
) -> list[list[list[dict[str, object]]]]:
    """By layer and expert: the tokens with the highest shares, as text."""
    layers = []
    for layer in range(trace.layers):
        chosen = trace.chosen[:, layer]
        found = top_tokens(tokens, chosen, trace.experts, count=settings.top, least=settings.least)
        layers.append(
            [
                [
                    {**top._asdict(), "text": tokenizer.decode(np.asarray([top.token]))}
                    for top in own
                ]
                for own in found
            ]
        )
    return layers


def routing(settings: Settings) -> list[Measurement]:
    """Records, counts and publishes."""
    require(settings.model != "", "which model? give --model RUN, FOLDER or hf:OWNER/NAME")
    out = output_folder(settings.out)
    trace, tokens, tokenizer = record(settings, out)
    listed = listed_tokens(trace, tokens, tokenizer, settings)
    write_atomically(out / "tokens.json", json.dumps(listed, indent=1, ensure_ascii=False))
    shares = shares_by_domain(trace)
    bits = specialisation(shares)
    chance = by_chance(trace, seed=0)
    rows = [Measurement("tokens", len(tokens), "tokens")]
    for layer, (own, permuted) in enumerate(zip(bits, chance, strict=True)):
        name = f"specialisation_layer_{layer}"
        rows.append(Measurement(name, float(own), "bits", f"{name}_by_chance"))
        rows.append(Measurement(f"{name}_by_chance", float(permuted), "bits"))
    highest = int(bits.argmax())
    verdict = (
        f"{settings.model}: an expert tells {bits.mean():.3f} bits about the domain, the mean of "
        f"{trace.layers} layers ({chance.mean():.3f} with the domains permuted; at most "
        f"{np.log2(len(trace.domains)):.3f}). Layer {highest} tells the most, {bits[highest]:.3f}."
    )
    figure = plot_shares(shares, trace.domains, "experts by domain")
    publish(
        out,
        experiment="routing",
        question=QUESTION,
        settings=settings,
        measurements=rows,
        verdict=verdict,
        figures={"routing": figure},
    )
    return rows


def main(argv: list[str]) -> None:
    """Parses and shows."""
    routing(parse_settings(Settings(), argv, (__doc__ or "").splitlines()[0]))


if __name__ == "__main__":
    program(main)
