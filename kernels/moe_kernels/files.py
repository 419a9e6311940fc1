"""Results on disk."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Writes a file under another name and renames it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody knows beforehand: a link cannot be planted there.
    descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o644)
            file.write(json.dumps(content, indent=1) + "\n")
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
