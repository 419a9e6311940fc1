"""A corpus of a few files with awkward texts, and prepare() for it."""

from pathlib import Path

from moe_jax.config import DataConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokens import TokenData, prepare

TEXTS = {
    "a.py": "def f(x):\n    return x + 1\n" * 40,
    "b.txt": "The quick brown fox jumps over the lazy dog, 12345 times.\n" * 30,
    "deep/c.txt": "naïve café — 日本語 🙂\r\n\ttabs and  spaces \n\n\n",
    "deep/empty.txt": "",
    "d.txt": "one line without an end",
}


def quiet(line: str) -> None:
    """A `say` that says nothing."""


class Prepare:
    """Calls prepare() on a folder and records the lines that it prints."""

    def __init__(self, folder: Path, cache: Path):
        self.folder = folder
        self.cache = cache
        self.said: list[str] = []

    def config(self, **settings) -> DataConfig:
        source = f"files:{self.folder}/**/*"
        defaults = {"source": source, "cache": str(self.cache), "tokenizer": "bpe:300"}
        return DataConfig(**{**defaults, "validation_fraction": 0.3, **settings})

    def __call__(self, handed_in: Tokenizer | None = None, **settings) -> TokenData:
        self.said = []
        return prepare(self.config(**settings), handed_in, self.said.append)
