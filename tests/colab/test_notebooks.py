"""The notebooks: their two forms agree, they run from top to bottom, and they leave JAX alone."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

from moe_jax.predict.absent import missing
from tests.test_installed import interpreter

COLAB = Path(__file__).parents[2] / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.py"))
PICTURES = {
    "01_quickstart": 4,
    "02_routing_playground": 4,
    "03_levers": 6,
    "04_plan_a_cluster": 3,
    "05_write_a_kernel": 2,
}
"""Figures that each notebook shows."""
SECONDS = 600
INSTALL = 1
"""Place of the cell that installs."""


def names(path: Path) -> str:
    return path.stem


def pictures(notebook) -> int:
    """Pictures below the cells."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_the_notebook_says_what_its_text_says(path):
    """After an edit: python -m tests.colab.keep_outputs colab/NAME.py"""
    text, notebook = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in text.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_the_outputs_are_kept_and_name_no_machine(path):
    notebook = nbformat.read(path.with_suffix(".ipynb"), 4)
    assert pictures(notebook) == PICTURES[path.stem]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    said = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"(?<![\w.:])/(tmp|home|root|work)/", said)


def test_all_notebooks_install_in_the_same_way():
    cells = {jupytext.read(path).cells[INSTALL].source for path in NOTEBOOKS}
    assert len({re.sub(r"(?m)^(#.*\n)?EXTRA = .*$", "", cell) for cell in cells}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=names)
def test_notebook_runs_from_top_to_bottom_and_once_more(path, tmp_path, monkeypatch):
    if path.stem.startswith("04") and (reason := missing()):
        pytest.skip(f"no compiler for absent GPUs: {reason}")
    monkeypatch.setenv("STEPS", "20")
    notebook = jupytext.read(path)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources=resources
    )
    with client.setup_kernel():
        for _ in range(2):  # the second time in the same session
            for place, cell in enumerate(notebook.cells):
                client.execute_cell(cell, place)
            assert pictures(notebook) == PICTURES[path.stem]


PROBE = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in ("jax", "jaxlib", "numpy")}))
"""


@pytest.mark.slow
def test_the_first_cell_keeps_the_jax_that_is_there(tmp_path):
    """In a Python 3.12 that has a JAX of its own, as Colab's."""
    python = interpreter("3.12")
    if python is None:
        pytest.skip("no Python 3.12 is here")
    root = COLAB.parent
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("this is no checkout: the cell installs from a repository")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    own = tmp_path / "venv" / "bin" / "python"
    subprocess.run([own, "-m", "pip", "install", "-q", "jax==0.11.1", "numpy<2.5"], check=True)

    def run(code: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [own, "-c", code], cwd=tmp_path, env=kept, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    before = run(PROBE)
    cell = jupytext.read(NOTEBOOKS[0]).cells[INSTALL].source
    run(cell.replace('ADDRESS = ""', f'ADDRESS = "file://localhost{root}"'))
    assert run(PROBE) == before
    assert "True" in run("import moe_jax.runs.run, jax; print(jax.jit(lambda x: x + 1)(1) == 2)")
