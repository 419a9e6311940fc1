"""The report as one HTML page, which holds its plots and asks for nothing else."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from moe_jax.study.article.claims import Answer
from moe_jax.study.article.markdown import FIELDS, HEADINGS, field_text

STYLE = """
:root { color-scheme: light dark; --ink: #1b1e23; --soft: #5a626e; --paper: #fdfdfb;
  --line: #d9dbdf; --panel: #f4f4f0; --link: #1d5fa8; --good: #1c7a45; --half: #96690a;
  --bad: #b3372c; --open: #5a626e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #a0a8b4; --paper: #16181c;
  --line: #353a42; --panel: #1f2329; --link: #7fb4ee; --good: #68c690; --half: #e0b252;
  --bad: #ef8a80; --open: #a0a8b4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 56rem; padding: 2.5rem 1.25rem 5rem; color: var(--ink);
  background: var(--paper); font: 17px/1.6 Charter, "Bitstream Charter", Georgia, serif;
  overflow-wrap: break-word; }
h1, h2, th, dt, .verdict, nav { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .5rem; }
.lead { color: var(--soft); margin: 0 0 .5rem; }
a { color: var(--link); }
table { width: 100%; border-collapse: collapse; margin: 2rem 0; font-size: .95rem; }
th, td { padding: .5rem .75rem .5rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-size: .8rem; color: var(--soft); }
td:last-child { white-space: nowrap; }
.verdict { font-size: .85rem; font-weight: 600; }
.supported { color: var(--good); } .partly { color: var(--half); }
.not-supported { color: var(--bad); } .not-testable-here { color: var(--open); }
section { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1.75rem; }
blockquote { margin: .75rem 0 1.25rem; padding-left: 1rem; border-left: 3px solid var(--line);
  font-style: italic; }
dl { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: .6rem 1.25rem; margin: 0; }
dt { font-size: .85rem; color: var(--soft); padding-top: .15rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
ul { margin: 0; padding-left: 1.1rem; }
pre { margin: 1.25rem 0 0; padding: .7rem 1rem; overflow-x: auto; background: var(--panel);
  border-radius: 6px; font-size: .85rem; }
figure { margin: 1.5rem 0 0; }
img { display: block; max-width: 100%; height: auto; background: white; border-radius: 6px;
  border: 1px solid var(--line); }
@media (max-width: 36rem) { body { font-size: 16px; padding-top: 1.5rem; } h1 { font-size: 1.6rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: .8rem; }
  td:last-child { white-space: normal; } }
"""


def write_page(answers: Sequence[Answer], notes: Sequence[str], root: Path) -> str:
    """The page as text. Plots are read below `root`."""
    lead = "".join(f'<p class="lead">{html.escape(note)}</p>\n' for note in notes)
    body = "\n".join(_section(answer, root) for answer in answers)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>The article's claims</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>The article's claims</h1>\n{lead}{_summary(answers)}\n{body}\n</body>\n</html>\n"
    )


def _summary(answers: Sequence[Answer]) -> str:
    """The table of verdicts, with a link to each section."""
    rows = "\n".join(
        f'<tr><td><a href="#{a.name}">{html.escape(a.title)}</a></td>'
        f"<td>{html.escape(a.claimed)}</td><td>{_badge(a)}</td></tr>"
        for a in answers
    )
    return f"<table>\n<tr><th>claim</th><th>claimed</th><th>verdict</th></tr>\n{rows}\n</table>"


def _badge(answer: Answer) -> str:
    return f'<span class="verdict {answer.verdict.replace(" ", "-")}">{answer.verdict}</span>'


def _section(answer: Answer, root: Path) -> str:
    fields = "\n".join(
        f"<dt>{HEADINGS.get(name, name).capitalize()}</dt><dd>{_field(answer, name)}</dd>"
        for name in FIELDS
    )
    plots = "".join(_picture(root / plot, answer.title) for plot in answer.plots)
    return (
        f'<section id="{answer.name}">\n<h2>{html.escape(answer.title)}</h2>\n'
        f"<blockquote>{html.escape(answer.claim)}</blockquote>\n<dl>\n{fields}\n</dl>\n"
        f"<pre>python {html.escape(answer.command)}</pre>\n{plots}</section>"
    )


def _field(answer: Answer, name: str) -> str:
    if name == "verdict":
        return f"{_badge(answer)} {html.escape(answer.because)}"
    if name == "published" and answer.published:
        lines = (f"{html.escape(p.figure)} ({html.escape(p.source)})" for p in answer.published)
        return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"
    return html.escape(field_text(answer, name))


def _picture(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(f"{title}: {path.stem.replace('_', ' ')}")
    return f'<figure><img alt="{name}" src="data:image/png;base64,{data}"></figure>\n'
