"""What a search found: the table, candidates.csv, result.json and the command of the best one."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace

from moe_jax.base.files import write_atomically
from moe_jax.base.result import Measurement, output_folder
from moe_jax.cli import command_line
from moe_jax.config.presets import PRESETS
from moe_jax.study.layout_search.figures import draw, pareto
from moe_jax.study.layout_search.search import Search
from moe_jax.study.layout_search.tries import Try
from moe_jax.study.results import publish

QUESTION = "Which layout of this run is the fastest that fits on GPUs that are not here?"
NUMBERS = ("step_seconds", "bytes_per_device", "fits", "tokens_per_second_per_device", "mfu")
STATES = ("compiled", "too large", "refused", "failed", "not tried")


def report(search: Search, tries: Sequence[Try]) -> None:
    """Writes all of it into the folder of the search, and prints it."""
    out = output_folder(search.settings.out)
    settings = search.settings
    write_atomically(out / "candidates.csv", table(tries))
    title = f"{search.config.preset} on {settings.devices} {search.card.name}"
    publish(
        out,
        experiment="predict_search",
        question=QUESTION,
        settings={**asdict(settings), "run": asdict(search.config)},
        measurements=measurements(tries),
        verdict=verdict(search, tries),
        figures={"search": draw(tries, search.card.memory_bytes, title)},
    )


def ranked(tries: Sequence[Try]) -> list[Try]:
    """Those that fit, the fastest first."""
    fitting = [one for one in tries if one.fits]
    return sorted(fitting, key=lambda one: one.value("step_seconds"))


def table(tries: Sequence[Try]) -> str:
    """All candidates as CSV: those that fit by their time, then the others as they were planned."""
    best = ranked(tries)
    rest = [one for one in tries if one not in best]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ("name", "state", "seconds_low", "seconds_high", *NUMBERS, "compile_seconds")
    writer.writerow((*head, "least_bytes", "formula_seconds", "why"))
    for one in (*best, *rest):
        cells: list[object] = [""] * (2 + len(NUMBERS) + 1)
        if one.rows is not None:
            cells = [*one.interval, *(one.value(n) for n in NUMBERS), one.value("compile_seconds")]
        known = (one.least or "", one.rough.seconds or "", one.line)
        writer.writerow((one.candidate.name, one.state, *cells, *known))
    return text.getvalue()


def measurements(tries: Sequence[Try]) -> list[Measurement]:
    """How many there are of each state, and the numbers of those that were compiled."""
    counts = Counter(one.state for one in tries)
    rows = [Measurement("candidates", len(tries), "layouts")]
    rows += [Measurement(state.replace(" ", "_"), counts[state], "layouts") for state in STATES]
    for one in (*ranked(tries), *(one for one in tries if one.rows and not one.fits)):
        assert one.rows is not None
        rows += [
            replace(one.rows[name], name=f"{one.candidate.name}.{name}")
            for name in ("step_seconds", "bytes_per_device")
        ]
    for one in ranked(tries)[:1]:
        assert one.rows is not None
        rows += [replace(one.rows[name], name=f"best.{name}") for name in NUMBERS]
    return rows


def verdict(search: Search, tries: Sequence[Try]) -> str:
    """The best one with its command, and what was not tried."""
    counts = Counter(one.state for one in tries)
    small = (
        f"{len(tries)} layouts: {counts['compiled']} compiled, {counts['too large']} too large by "
        f"parameters, moments and gradients alone, {counts['refused']} refused, "
        f"{counts['failed']} failed, {counts['not tried']} not tried within "
        f"{search.settings.search_minutes:g} minutes (candidates.csv). The next start goes on."
    )
    best = ranked(tries)
    if not best:
        return f"None of those that were compiled fits. {small}"
    config = best[0].candidate.of(search.config)
    command = command_line(config, PRESETS[search.config.preset].resolved())
    size = best[0].value("bytes_per_device") / 2**30
    low, high = best[0].interval
    return (
        f"PREDICTED, and not measured: the fastest that fits takes "
        f"{best[0].value('step_seconds'):.3g} s a step ({low:.3g} to {high:.3g}) and {size:.1f} "
        f"GiB. {len(pareto(tries))} layouts are on the front of time and memory. {small} The "
        f"fastest one is\n\n    {command}\n"
    )
