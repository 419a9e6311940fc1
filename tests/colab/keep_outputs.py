"""Runs notebooks from their texts and keeps their outputs in the .ipynb files beside them.

python -m tests.colab.keep_outputs colab/NAME.py …
"""

import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient

SECONDS = 1200
"""The longest time of a cell. A busy machine is slower than a notebook should be."""


def keep_outputs(path: Path) -> None:
    """Runs the notebook in a folder of its own, without marks of time."""
    notebook = jupytext.read(path)
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    jupytext.write(notebook, path.with_suffix(".ipynb"))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        keep_outputs(Path(name))
