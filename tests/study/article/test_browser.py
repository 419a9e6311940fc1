"""The report in a real browser, without a window."""

import json
import re
import shutil
import subprocess

import pytest

from moe_jax.study.article.claims import read_article
from moe_jax.study.article.page import write_page
from tests.repository.sources import ROOT

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
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
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [400, 1200])
def test_page_in_a_browser(tmp_path, width):
    answers = read_article(ROOT / "experiments" / "article.toml", ROOT).answers()
    page = write_page(answers, ["Recorded."], ROOT)
    (tmp_path / "report.html").write_text(page.replace("</body>", LOOK))
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options += ["--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [str(BROWSER), *options, (tmp_path / "frame.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[:500]
    seen = json.loads(found[1].replace("&amp;", "&"))
    assert seen["headings"] == [answer.title for answer in answers]
    assert seen["images"] == sum(len(answer.plots) for answer in answers) > 0
    assert (seen["broken"], seen["dead"], seen["requests"]) == ([], 0, 0)
    assert seen["width"] == width
    assert seen["needed"] <= width
