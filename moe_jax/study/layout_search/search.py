"""The search: prune by memory, order by a formula, compile until the time is over."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from moe_jax import cli
from moe_jax.base.console import say
from moe_jax.base.errors import UserError
from moe_jax.base.signals import keeping
from moe_jax.config import TrainConfig
from moe_jax.predict.answer import PredictSettings, check_compiler
from moe_jax.predict.hardware import Card, find_card
from moe_jax.predict.lower import check_visible, program_hash, source_hash
from moe_jax.study.layout_search.candidates import SEARCHED, Candidate, candidates
from moe_jax.study.layout_search.estimates import least_bytes, rough_update
from moe_jax.study.layout_search.tries import Try, compile_one, finished
from moe_jax.train.state import TrainState, abstract_state

VARIANT = 1.2
"""How much slower each further variant of the same axes is taken to be, so that other axes are
tried before all variants of the first ones."""


@dataclass(frozen=True)
class Search:
    """A search that was checked."""

    settings: PredictSettings
    config: TrainConfig
    card: Card
    argv: list[str]
    """The command line, without the program."""
    program: str
    """experiments/predict.py"""

    @classmethod
    def of(
        cls, settings: PredictSettings, config: TrainConfig, argv: list[str], program: str
    ) -> "Search":
        """UserError: unknown hardware, a run that no program shows, or the compiler is missing."""
        card = find_card(settings.hardware)
        check_visible(config)
        check_compiler()
        return cls(settings, config, card, argv, program)

    @property
    def kept(self) -> set[str]:
        """Fields that the command line sets, which are not searched."""
        preset = bool(self.argv) and not self.argv[0].startswith("-")
        named = cli.fields_set(self.argv[preset:], TrainConfig, PredictSettings)
        return named & set(SEARCHED)

    def folder(self, candidate: Candidate) -> Path:
        """Of the candidate's result, by all that its numbers depend on."""
        parts = (
            program_hash(candidate.of(self.config), self.card, self.settings.devices),
            source_hash(()),
            repr(self.card),
            self.settings.price,
        )
        key = sha256(repr(parts).encode()).hexdigest()[:12]
        return Path(self.settings.out) / "candidates" / f"{candidate.name}-{key}"

    def command(self, candidate: Candidate) -> list[str]:
        """What predicts one candidate. Of an option that is given twice the last one counts."""
        options = cli.to_argv(TrainConfig, {k: str(v) for k, v in candidate.options.items()})
        return [self.program, *self.argv, "--no-search", *options]


def plan(search: Search) -> list[Try]:
    """All candidates: those to be tried in their order, then the others with their reasons."""
    found = list(_planned(search))
    ready = [one for one in found if one.state == "not tried"]
    return [
        *in_order(ready, search.card.memory_bytes),
        *(one for one in found if one.state != "not tried"),
    ]


def in_order(tries: Sequence[Try], memory: int) -> list[Try]:
    """The fastest by formula first. What does not fit by the formula may fit, and comes later."""
    earlier: Counter[tuple[Any, ...]] = Counter()
    places: list[tuple[bool, float, Try]] = []
    for one in sorted(tries, key=lambda one: (one.rough.memory > memory, one.rough.seconds)):
        slower = VARIANT ** earlier[one.candidate.axes]
        places.append((one.rough.memory > memory, slower * one.rough.seconds, one))
        earlier[one.candidate.axes] += 1
    return [one for *_, one in sorted(places, key=lambda place: place[:2])]


def _planned(search: Search) -> Iterator[Try]:
    state = abstract_state(search.config)
    for candidate in candidates(search.config, search.settings.devices, search.kept):
        try:
            yield _estimated(search, candidate, state)
        except UserError as error:
            yield Try(candidate, "refused", line=str(error))


def _estimated(search: Search, candidate: Candidate, state: TrainState) -> Try:
    devices = search.settings.devices
    card = search.card
    config = candidate.of(search.config).resolved()
    least = least_bytes(config, state, devices)
    if least > card.memory_bytes:
        line = f"at least {least / 2**30:.1f} of {card.memory_bytes / 2**30:.1f} GiB"
        return Try(candidate, "too large", least, line=line)
    return Try(candidate, "not tried", least, rough_update(config, card, devices))


def run(search: Search, tries: list[Try], clock: Callable[[], float] = time.monotonic) -> list[Try]:
    """Compiles candidates in their order until the time is over. The list with what came of it."""
    minutes = search.settings.search_minutes
    end = clock() + 60 * minutes
    ready = sum(one.state == "not tried" for one in tries)
    say(f"{len(tries)} layouts, of which {ready} may fit: compiling for {minutes:g} minutes")
    with keeping(lambda: "what was compiled is kept, the next start goes on"):
        return [_tried(search, one, end, clock) for one in tries]


def _tried(search: Search, planned: Try, end: float, clock: Callable[[], float]) -> Try:
    if planned.state != "not tried":
        return planned
    folder = search.folder(planned.candidate)
    known = finished(planned, folder)
    left = end - clock()
    if known is None and left > 0:
        known = compile_one(planned, folder, search.command(planned.candidate), left)
        say(line_of(known or replace(planned, line="the time was over")))
    return known or planned


def line_of(one: Try) -> str:
    """A candidate on the console."""
    name = one.candidate.name
    if one.rows is None:
        return f"{name}: {one.state} ({one.line})"
    size = one.value("bytes_per_device") / 2**30
    fits = "" if one.fits else ", which does not fit"
    return f"{name}: {one.value('step_seconds'):.3g} s PREDICTED, {size:.1f} GiB{fits}"
