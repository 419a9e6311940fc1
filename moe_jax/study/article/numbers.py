"""Figures of result files by name, and the `{file|name|format}` that stand for them in text.

`file` is an alias of the data file, `name` a measurement. `min NAMES` and `max NAMES` with `*` take
the lowest and the highest of several. `format` is Python's, after one of these words:

- `abs`: without the sign,
- `less`: 1 - value,
- `over`: 1 / value,
- `interval`: both ends of the 95% interval, "[0.1, 0.2]".
"""

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from moe_jax.base.errors import UserError, near_name, quote, require
from moe_jax.base.result import Measurement
from moe_jax.study.results import read_measurements

REFERENCE = re.compile(r"\{([^{}|]+)\|([^{}|]+)\|([^{}|]*)\}")
CHANGES = {"abs": abs, "less": lambda value: 1 - value, "over": lambda value: 1 / value}


class Numbers:
    """The measurements of every file, read when the first of them is asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files
        self._read: dict[str, dict[str, Measurement]] = {}

    def of(self, alias: str) -> dict[str, Measurement]:
        """The measurements of a file by name. UserError: no such alias, or it cannot be read."""
        known = near_name(alias, self.files)
        require(alias in self.files, f"{quote(alias)} is no result file of the data file{known}")
        if alias not in self._read:
            path = self.files[alias]
            try:
                self._read[alias] = read_measurements(path)
            except FileNotFoundError as error:
                raise UserError(f"{path} is missing: run its experiment") from error
            except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{path} is no result.json: {error!r}") from error
        return self._read[alias]

    def find(self, alias: str, name: str) -> Measurement:
        """A measurement with a value. UserError: it is missing, or has no value."""
        rows = self.of(alias)
        word, _, names = name.partition(" ")
        if word in ("min", "max") and "*" in names:
            found = [m for m in rows.values() if m.value is not None and fnmatchcase(m.name, names)]
            require(bool(found), f"{self.files[alias]} has no measurement like {quote(names)}")
            return (min if word == "min" else max)(found, key=lambda m: float(m.value or 0))
        near = near_name(name, rows)
        require(name in rows, f"{self.files[alias]} has no measurement {quote(name)}{near}")
        require(rows[name].value is not None, f"{self.files[alias]}: {name} has no value")
        return rows[name]

    def look_up(self, reference: str) -> Measurement:
        """The measurement that `file|name` names."""
        alias, bar, name = reference.partition("|")
        require(bool(bar), f"{quote(reference)} is no reference: write file|name")
        return self.find(alias, name)

    def fill(self, text: str) -> str:
        """`text` with every reference replaced by its figure."""
        filled = REFERENCE.sub(lambda found: self._shown(*found.groups()), text)
        require("{" not in filled, f"{quote(filled)} has a brace that is no {{file|name|format}}")
        return filled

    def _shown(self, alias: str, name: str, form: str) -> str:
        row = self.find(alias, name)
        word, _, rest = form.rpartition(" ")
        if word == "interval":
            require(row.interval is not None, f"{self.files[alias]}: {name} has no interval")
            return "[" + ", ".join(format(end, rest) for end in row.interval or []) + "]"
        try:
            value = CHANGES[word](row.value) if word else row.value
            return format(value, rest)
        except (KeyError, ValueError) as error:
            raise UserError(f"{quote(form)} is no format of {alias}|{name}: {error}") from error
