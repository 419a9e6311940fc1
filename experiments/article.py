"""What did each lever buy? The article's claims with figures, limits and verdicts, as one report.

    python experiments/article.py [--out DIR] [--quick] [--from-results] [--write-docs]

The claims are in article.toml beside this file. Every figure of ours is looked up by name in a
result file. --from-results takes the recorded files. Otherwise the experiments run first, at a size
for this machine, and what they do not measure is taken from the recorded files. An experiment that
is finished in DIR is not repeated. --write-docs writes the tables of README.md and
experiments/README.md from the recorded files, and nothing else.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_jax.base.errors import UserError, require
from moe_jax.base.files import disk_errors, write_atomically
from moe_jax.base.provenance import provenance
from moe_jax.base.result import output_folder
from moe_jax.cli import parse_settings, program
from moe_jax.study.article.claims import Answer, read_article
from moe_jax.study.article.documents import write_documents
from moe_jax.study.article.levers import Outcome, levers_of, run_levers
from moe_jax.study.article.markdown import write_report
from moe_jax.study.article.page import write_page

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Settings:
    """Writes the report on the article's claims."""

    out: str = "runs/article"
    """Folder for the report as HTML and Markdown, result.json and the experiments' own folders."""
    quick: bool = False
    """Experiments of minutes: they show that everything runs. Their figures say nothing, so the
    report takes the recorded ones."""
    from_results: bool = False
    """Runs nothing."""
    write_docs: bool = False
    """Writes the tables of README.md and experiments/README.md instead of a report."""


def main(argv: list[str]) -> None:
    """Runs what has to be run, and writes the report."""
    settings = parse_settings(Settings(), argv, (__doc__ or "").splitlines()[0])
    together = settings.quick and settings.from_results
    require(not together, "--quick and --from-results exclude each other: choose one")
    article = read_article(DATA, ROOT)
    if settings.write_docs:
        for path in write_documents(article, ROOT):
            print(f"written: {path.relative_to(ROOT)}")
        return
    answers = article.answers()  # so that a missing name is reported before anything runs
    out = output_folder(settings.out)
    with disk_errors(out):
        failed: Mapping[str, str] = {}
        notes = ["Recorded results. Nothing was run for this report."]
        if not settings.from_results:
            levers = levers_of(article.content["run"], settings.quick)
            outcome = run_levers(levers, ROOT, out)
            used = outcome.results
            failed = outcome.failed
            if not settings.quick:
                used, failed = usable(outcome)
                answers = read_article(DATA, ROOT, used).answers()
            notes = run_notes(settings.quick, list(used), failed)
        write(out, answers, notes, failed)
    print(f"{out}/report.html, report.md, result.json")


def usable(outcome: Outcome) -> tuple[dict[str, Path], dict[str, str]]:
    """(results that have every figure of the report, what failed). Recorded ones stand in."""
    used: dict[str, Path] = {}
    failed = dict(outcome.failed)
    for alias, path in outcome.results.items():
        try:
            read_article(DATA, ROOT, {alias: path}).answers()
            used[alias] = path
        except UserError as error:
            failed[alias] = f"its result lacks a figure of the report: {error}"
    return used, failed


def run_notes(quick: bool, done: list[str], failed: Mapping[str, str]) -> list[str]:
    """Where the figures of the report are from."""
    names = ", ".join(done) or "none"
    if quick:
        notes = [f"Ran here, as a check and too short for figures: {names}. Figures are recorded."]
    else:
        notes = [f"Measured for this report: {names}. All other figures are recorded ones."]
    return notes + [f"{name} failed: {why}" for name, why in failed.items()]


def write(out: Path, answers: list[Answer], notes: list[str], failed: Mapping[str, str]) -> None:
    """The three files, and the plots that the Markdown shows."""
    gpu = "No GPU was there: speeds of GPUs are PREDICTED or SIMULATED, or others measured them."
    words = "Claims are in our words. The article's own words are in quotation marks."
    notes = [*notes, gpu, words]
    for plot in {plot for answer in answers for plot in answer.plots}:
        (out / "plots").mkdir(exist_ok=True)
        shutil.copyfile(ROOT / plot, out / "plots" / Path(plot).name)
    write_atomically(out / "report.md", write_report(answers, notes))
    write_atomically(out / "report.html", write_page(answers, notes, ROOT))
    content = {
        "experiment": "article",
        **provenance(),
        "notes": notes,
        "failed": dict(failed),
        "claims": [asdict(answer) for answer in answers],
    }
    write_atomically(out / "result.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    program(main)
