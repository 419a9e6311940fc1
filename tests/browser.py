"""A page in a headless browser: what it shows, at a width, in light or dark."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
PROBE = """
<script>
const style = getComputedStyle(document.body);
const seen = {
  headings: [...document.querySelectorAll("h1, h2, h3")].map(one => one.textContent),
  links: [...document.links].map(one => one.getAttribute("href")),
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  text: style.color,
  width: document.documentElement.scrollWidth,
  window: window.innerWidth,
};
addEventListener("load", () => {
  const found = document.createElement("pre");
  found.id = "seen";
  seen.images = [...document.images].map(image => image.naturalWidth > 0 && image.alt !== "");
  found.textContent = JSON.stringify(seen);
  document.body.append(found);
});
</script>
"""


def browser() -> str:
    """The path of a browser. Skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser is here: none of {', '.join(NAMES)}")
    return found


def run(page: Path, folder: Path, *options: str, width: int, dark: bool) -> str:
    """What the browser prints for a page."""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = f"--window-size={width},1600"
    command = [browser(), *OPTIONS, scheme, size, f"--user-data-dir={folder / 'profile'}", *options]
    done = subprocess.run(
        [*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def seen(page: Path, folder: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """Headings, whether each image is drawn and described, links, widths, the colour scheme."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{PROBE}</body>"))
    dom = run(probed, folder, "--dump-dom", width=width, dark=dark)
    [found] = re.findall(r'<pre id="seen">(.*?)</pre>', dom, flags=re.DOTALL)
    return json.loads(unescape(found))


def screenshot(page: Path, folder: Path, *, width: int, dark: bool = False) -> Path:
    """A picture of the top of the page."""
    picture = folder / f"{width}-{'dark' if dark else 'light'}.png"
    run(page, folder, f"--screenshot={picture}", width=width, dark=dark)
    return picture
