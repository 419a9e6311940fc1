"""How do runs compare? Loss, speed, expert loads, drops, memory, and the settings that differ.

    python experiments/inspect_runs.py RUN [RUN …] [--html FILE]

RUN is the --out of a training run, finished or not. --html writes one page with plots as well.
"""

from dataclasses import dataclass

from rich.table import Table

from moe_jax.base.console import console
from moe_jax.base.errors import require
from moe_jax.base.files import disk_errors, write_atomically
from moe_jax.base.paths import user_path
from moe_jax.base.provenance import call_of
from moe_jax.cli import parse_settings
from moe_jax.runs.comparison import differences, look, short_names, table
from moe_jax.runs.page import write_page


@dataclass(frozen=True)
class Settings:
    """Compares runs."""

    html: str = ""
    """A file for one page with the tables and plots."""


def main(argv: list[str]) -> None:
    """Reads the runs, prints tables, writes the page."""
    count = next((n for n, word in enumerate(argv) if word.startswith("-")), len(argv))
    prog = f"{call_of('inspect-runs')} RUN [RUN …]"
    settings = parse_settings(Settings(), argv[count:], (__doc__ or "").splitlines()[0], prog)
    require(count > 0, "which runs? give the folders of training runs first")
    runs = [look(out) for out in argv[:count]]
    names = short_names(runs)
    show("", names, table(runs))
    if changed := differences(runs):
        show("settings that differ", names, changed)
    if settings.html:
        path = user_path(settings.html)
        with disk_errors(path.parent):
            write_atomically(path, write_page(runs))
        console.print(f"the page: {path}", markup=False)


def show(title: str, names: list[str], rows: dict[str, list[str]]) -> None:
    """Prints a table with a column for each run."""
    shown = Table(title=title or None, title_justify="left")
    for name in ("", *names):
        shown.add_column(name, overflow="fold")
    for name, values in rows.items():
        shown.add_row(name, *values)
    console.print(shown, soft_wrap=False)
