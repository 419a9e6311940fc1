"""Rows that are printed as soon as they are measured."""

import json
from pathlib import Path

from moe_jax.base.numbers import number_text


class LiveTable:
    """Prints rows as soon as they are measured, and appends them to a file of JSON lines.

    The file is begun anew. An experiment that is stopped leaves the rows it had measured.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: tuple[str, ...] = ()
        path.write_text("")

    def row(self, section: str, name: str, note: str = "", **values: float | int | None) -> None:
        """One line. A heading comes first where the section or its columns change."""
        if (section, *values) != self._columns:
            self._columns = (section, *values)
            print(f"\n{section}\n{'':26}" + "".join(f"{column:>17}" for column in values))
        cells = "".join(f"{number_text(value):>17}" for value in values.values())
        print(f"{name:26}{cells}  {note}".rstrip(), flush=True)
        line = {"section": section, "name": name, "note": note, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
