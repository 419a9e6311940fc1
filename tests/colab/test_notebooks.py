from pathlib import Path

import jupytext
import nbclient
import pytest

COLAB = Path(__file__).parent.parent.parent / "colab"


@pytest.mark.parametrize("path", sorted(COLAB.glob("*.py")), ids=lambda path: path.stem)
def test_the_notebook_says_what_its_text_says(path):
    """After an edit: jupytext --to ipynb colab/*.py"""
    text, notebook = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in text.cells]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(COLAB.glob("*.py")), ids=lambda path: path.stem)
def test_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "20")
    monkeypatch.setenv("OUT", str(tmp_path / "run"))
    notebook = jupytext.read(path)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3
    assert (tmp_path / "run" / "result.json").exists()
