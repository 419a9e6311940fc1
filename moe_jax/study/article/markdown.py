"""The report and the tables of the repository's documents, as Markdown."""

from collections.abc import Sequence

from moe_jax.study.article.claims import Answer, Article

FIELDS = ("claimed", "measured", "interval", "predicted", "published", "limit", "verdict")
HEADINGS = {"interval": "95% interval", "limit": "physical limit", "measured": "measured here"}


def interval_text(answer: Answer) -> str:
    """Both ends with the unit and the baseline, or why there is none."""
    if answer.value is None:
        return "none: no figure of this claim was measured here"
    unit = f"{answer.unit}, baseline: {answer.baseline}" if answer.baseline else answer.unit
    if answer.interval is None:
        return f"none recorded for {answer.value:.4g} ({unit})"
    low, high = answer.interval
    return f"{answer.value:.4g} [{low:.4g}, {high:.4g}] ({unit})"


def published_text(answer: Answer) -> str:
    """Every figure of others with its source."""
    return "; ".join(f"{one.figure} ({one.source})" for one in answer.published) or "none known"


def field_text(answer: Answer, field: str) -> str:
    """A field of the report as a line of text."""
    if field == "interval":
        return interval_text(answer)
    if field == "published":
        return published_text(answer)
    if field == "verdict":
        return f"{answer.verdict}. {answer.because}"
    return getattr(answer, field)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def write_report(answers: Sequence[Answer], notes: Sequence[str]) -> str:
    """The whole report."""
    parts = ["# The article's claims", *notes]
    parts.append(table(("claim", "verdict"), [(a.title, a.verdict) for a in answers]))
    for answer in answers:
        parts += [f"## {answer.title}", f"> {answer.claim}"]
        lines = [
            f"- **{HEADINGS.get(f, f).capitalize()}**: {field_text(answer, f)}" for f in FIELDS
        ]
        parts += ["\n".join(lines), f"```\npython {answer.command}\n```"]
        parts += [f"![{answer.title}](plots/{plot.rpartition('/')[2]})" for plot in answer.plots]
    return "\n\n".join(parts) + "\n"


def verdict_table(article: Article) -> str:
    """README's table: the claims, and what else was found."""
    rows = [
        (
            a.title,
            a.verdict,
            _answer_text(a),
            f"`{a.command}`",
            f"[{_page(a.details)}]({a.details})",
        )
        for a in article.answers()
    ]
    rows += [
        (
            f["title"],
            "",
            f["answer"],
            f"`{f['command']}`",
            f"[{_page(f['details'])}]({f['details']})",
        )
        for f in article.rows("finding")
    ]
    return table(("claim", "verdict", "answer", "command", "details"), rows)


def question_table(article: Article) -> str:
    """The table of experiments/README.md."""
    rows = [(row["question"], row["command"], row["result"]) for row in article.rows("question")]
    return table(("question", "command", "result"), rows)


def _answer_text(answer: Answer) -> str:
    """What was measured here. Where nothing was, the prediction."""
    return answer.predicted if answer.value is None else answer.measured


def _page(path: str) -> str:
    """The name of a page: "hot cold" of docs/results/hot_cold.md."""
    return path.rpartition("/")[2].partition(".md")[0].replace("_", " ")
