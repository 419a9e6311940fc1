"""The report in a real browser, without a window."""

import json
import re

import pytest

from moe_jax.study.article.claims import read_article
from moe_jax.study.article.page import write_page
from tests.browser import run
from tests.repository.sources import ROOT

LOOK = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  headings: [...document.querySelectorAll("h2")].map(h => h.textContent),
  broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
  images: document.images.length,
  dead: [...document.links].filter(a => !document.querySelector(a.getAttribute("href"))).length,
  requests: performance.getEntriesByType("resource")
    .filter(e => !e.name.startsWith("data:")).length,
  width: innerWidth, needed: document.documentElement.scrollWidth}), "*"))</script></body>"""
FRAME = """<body><pre id="seen"></pre><script>addEventListener("message",
  e => document.getElementById("seen").textContent = e.data)</script>
<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
def test_page_in_a_browser(tmp_path, width):
    answers = read_article(ROOT / "experiments" / "article.toml", ROOT).answers()
    page = write_page(answers, ["Recorded."], ROOT)
    (tmp_path / "report.html").write_text(page.replace("</body>", LOOK))
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    # In a frame, because a browser's window cannot be as narrow.
    options = ("--dump-dom", "--virtual-time-budget=10000")
    dom = run(tmp_path / "frame.html", tmp_path, *options, width=1300, dark=False)
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[:500]
    seen = json.loads(found[1].replace("&amp;", "&"))
    assert seen["headings"] == [answer.title for answer in answers]
    assert seen["images"] == sum(len(answer.plots) for answer in answers) > 0
    assert (seen["broken"], seen["dead"], seen["requests"]) == ([], 0, 0)
    assert seen["width"] == width
    assert seen["needed"] <= width
