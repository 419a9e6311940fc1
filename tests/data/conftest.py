from pathlib import Path

import pytest

from tests.data.small_corpus import TEXTS, Prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """TEXTS as files."""
    root = tmp_path / "corpus"
    for name, text in TEXTS.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


@pytest.fixture
def prepared(folder: Path, tmp_path: Path) -> Prepare:
    return Prepare(folder, tmp_path / "cache")
