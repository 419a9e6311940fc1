"""The data file: sentences of the article, where their figures are, and how verdicts are given."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.base.errors import UserError, quote, require
from moe_jax.study.article.numbers import Numbers

VERDICTS = ("supported", "partly", "not supported", "not testable here")
TEXTS = ("claim", "claimed", "measured", "predicted", "limit", "because", "command")
"""Fields that every claim has, in the order of the report."""


@dataclass(frozen=True)
class Published:
    """A figure of others."""

    figure: str
    source: str


@dataclass(frozen=True)
class Answer:
    """A claim with its figures filled in."""

    name: str
    title: str
    claim: str
    claimed: str
    measured: str
    predicted: str
    limit: str
    verdict: str
    because: str
    command: str
    details: str
    """The page with method and tables, from the repository's root."""
    value: float | None
    """The figure that the interval is of. None: none was measured here."""
    unit: str
    baseline: str | None
    interval: list[float] | None
    published: list[Published]
    plots: list[str]
    """Pictures of the repository, from its root."""


@dataclass(frozen=True)
class Article:
    """The whole data file."""

    content: Mapping[str, Any]
    numbers: Numbers

    def answers(self) -> list[Answer]:
        """Every claim, in the order of the file."""
        return [_answer(row, self.numbers) for row in self.content["claim"]]

    def rows(self, table: str) -> list[dict[str, str]]:
        """A table of texts (`finding`, `question`), with the figures filled in."""
        fill = self.numbers.fill
        return [{key: fill(text) for key, text in row.items()} for row in self.content[table]]


def read_article(path: Path, root: Path, instead: Mapping[str, Path] | None = None) -> Article:
    """The data file. Results are looked up below `root`, or in the files of `instead` by alias.

    UserError: it cannot be read, or a claim lacks a field.
    """
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is no TOML: {error}") from error
    for table in ("files", "claim", "finding", "question", "run"):
        require(table in content, f"{path} has no table {table}")
    files = {alias: root / name for alias, name in content["files"].items()}
    return Article(content, Numbers({**files, **(instead or {})}))


def _answer(row: Mapping[str, Any], numbers: Numbers) -> Answer:
    name = row.get("name", "?")
    for field in ("name", "title", "details", *TEXTS):
        require(field in row, f"claim {quote(name)} has no {field}")
    texts = {field: numbers.fill(row[field]) for field in ("title", "details", *TEXTS)}
    headline = numbers.look_up(row["value"]) if "value" in row else None
    return Answer(
        name=name,
        verdict=_verdict(row, numbers),
        value=None if headline is None or headline.value is None else float(headline.value),
        unit="" if headline is None else headline.unit,
        baseline=None if headline is None else headline.baseline,
        interval=None if headline is None else headline.interval,
        published=[
            Published(numbers.fill(entry["figure"]), entry["source"])
            for entry in row.get("published", [])
        ],
        plots=row.get("plots", []),
        **texts,
    )


def _verdict(row: Mapping[str, Any], numbers: Numbers) -> str:
    """The one that the file states, or that its rule gives: from `supported` on, from `partly` on.

    A rule of `sign = -1` is for figures that are better when they are lower.
    """
    if "verdict" in row:
        near = ", ".join(VERDICTS)
        require(row["verdict"] in VERDICTS, f"{quote(row['verdict'])} is no verdict: take {near}")
        return row["verdict"]
    require("rule" in row, f"claim {quote(row['name'])} has neither a verdict nor a rule")
    rule = row["rule"]
    value = rule.get("sign", 1) * float(numbers.look_up(rule["value"]).value or 0)
    if value >= rule["supported"]:
        return "supported"
    return "partly" if value >= rule.get("partly", rule["supported"]) else "not supported"
