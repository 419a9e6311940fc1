"""Do the presets have the parameters that their authors publish?

    python experiments/parameters.py [--out DIR]

Prints total and active parameters of every preset beside the published figures, and writes
DIR/result.json. The counts come from the models themselves. They are built under eval_shape, which
takes seconds and no memory.
"""

import math
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from moe_jax.base.result import Measurement, output_folder, write_result
from moe_jax.cli import parse_settings, program
from moe_jax.config.presets import PRESETS, PUBLISHED, Published
from moe_jax.model.count import Counts, count_parameters

QUESTION = "Do the presets have the parameters that their authors publish?"
UNEXPLAINED = "UNEXPLAINED"


@dataclass(frozen=True)
class Settings:
    """Counts the parameters of every preset."""

    out: str = "runs/parameters"
    """Folder for result.json."""
    seed: int = 0
    """Unused, since counting draws nothing."""
    quick: bool = False
    """No difference: counting takes seconds."""


@dataclass(frozen=True)
class Row:
    """One preset: its counts, the published ones, and the reason for a difference."""

    name: str
    counts: Counts
    published: Published | None

    def difference(self, ours: int, theirs: float) -> float:
        """ours / theirs - 1."""
        return ours / (theirs * 1e9) - 1

    def note(self) -> str:
        """The source. Before it comes the reason for a difference of more than 1%."""
        if self.published is None:
            return "ours"
        p = self.published
        notes = []
        for label, ours, theirs in (
            ("total", self.counts.total, p.total),
            ("active", self.counts.active, p.active),
        ):
            if abs(self.difference(ours, theirs)) > 0.01:
                notes.append(f"{label}: {_reason(ours / 1e9, theirs, self)}")
        return "; ".join([*notes, p.source])


def _reason(ours: float, theirs: float, row: Row) -> str:
    """How the published figure follows from ours, both in billions."""
    assert row.published is not None
    unit = row.published.rounding
    # Authors round, cut, or leave out the embedding, and rarely say which.
    without = ours - row.counts.embedding / 1e9
    look_up = f"leaves out the embedding look-up ({without:.2f}B without it)"
    if round(ours / unit) == round(theirs / unit):
        return f"published figure is rounded to {unit:g}B"
    if round(without / unit) == round(theirs / unit):
        return f"published figure {look_up}"
    if math.floor(ours / unit) == round(theirs / unit):
        return f"published figure is cut to {unit:g}B, not rounded"
    if math.floor(without / unit) == round(theirs / unit):
        return f"published figure {look_up} and is cut to {unit:g}B, not rounded"
    return UNEXPLAINED


def _table(rows: list[Row]) -> Table:
    table = Table(title=QUESTION, caption="active: K of E routed experts, everything else whole")
    for header in ("preset", "total", "published", "diff", "active", "published", "diff"):
        table.add_column(header, justify="left" if header == "preset" else "right", no_wrap=True)
    table.add_column("source, and the reason where a difference exceeds 1%", overflow="fold")
    for row in rows:
        cells = [row.name]
        for ours, theirs in (
            (row.counts.total, row.published and row.published.total),
            (row.counts.active, row.published and row.published.active),
        ):
            cells.append(f"{ours / 1e9:.2f}B" if ours > 1e9 else f"{ours / 1e6:.2f}M")
            cells.append(f"{theirs:g}B" if theirs else "")
            cells.append(f"{row.difference(ours, theirs):+.1%}" if theirs else "")
        table.add_row(*cells, row.note())
    return table


def _measurements(rows: list[Row]) -> list[Measurement]:
    found = []
    for row in rows:
        p = row.published
        for name, ours, theirs in (
            ("total", row.counts.total, p and p.total),
            ("active", row.counts.active, p and p.active),
        ):
            source = p.source if p else None
            ratio = ours / (theirs * 1e9) if theirs else None
            found.append(Measurement(f"{row.name}.{name}", ours, "parameters", source, ratio))
        if row.counts.mtp:
            found.append(Measurement(f"{row.name}.mtp", row.counts.mtp, "parameters"))
    return found


def main(argv: list[str]) -> None:
    """Counts, prints and writes."""
    settings = parse_settings(Settings(), argv, QUESTION)
    out = output_folder(settings.out)
    rows = [
        Row(name, count_parameters(config.resolved().model), PUBLISHED.get(name))
        for name, config in PRESETS.items()
    ]
    Console(width=150).print(_table(rows))
    unexplained = [row.name for row in rows if UNEXPLAINED in row.note()]
    verdict = (
        f"differences without an explanation: {', '.join(unexplained)}"
        if unexplained
        else "every published preset agrees to 1%, or its difference is rounding or the look-up"
    )
    write_result(
        out,
        experiment="parameters",
        question=QUESTION,
        config=settings,
        measurements=_measurements(rows),
        verdict=verdict,
    )
    print(f"{verdict}\n{out / 'result.json'}")


if __name__ == "__main__":
    program(main)
