"""Settings of the text and its tokens."""

import re
from dataclasses import dataclass, field

from moe_jax.base.errors import require
from moe_jax.config.checks import positive, strict_fraction
from moe_jax.config.codec import MAY_DIFFER

BYTE_VOCABULARY = 258
"""256 bytes and 2 special tokens: the smallest vocabulary of a tokenizer that loses nothing."""

BPE = "bpe:[0-9]{1,9}"
"""A tokenizer with N entries. \\d and isdigit also accept digits that int does not, such as ²."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    source: str = "stdlib"
    """`stdlib` (Python's own standard library), `files:GLOB`, or `hf:NAME`.
    A folder in place of GLOB stands for all files below it.
    hf is a data set of the Hugging Face hub and needs: pip install 'moe_jax[hf]'."""
    text_field: str = "text"
    """hf: column that holds the text."""
    binary: bool = False
    """files: also read files with NUL bytes. Else they are left out, as text has none."""
    tokenizer: str = "bpe:4096"
    """`bytes`, or `bpe:N`: byte-level BPE with N entries, trained once on the corpus."""
    length: int = 256
    """Tokens in one sequence (L)."""
    validation_fraction: float = 0.02
    """Share of the documents that is held out. A hash of a document's name decides.
    Documents with the same text are on the same side."""
    validation_tokens: int = 1_000_000
    """Largest number of tokens of held-out text that are evaluated: the first ones."""
    cache: str = field(default="", metadata=MAY_DIFFER)
    """Folder for tokenised corpora.
    Unset, $XDG_CACHE_HOME/moe_jax or ~/.cache/moe_jax."""

    def __post_init__(self) -> None:
        owner = "data"
        kind, _, argument = self.source.partition(":")
        require(
            self.source == "stdlib" or (kind in ("files", "hf") and argument != ""),
            f"{owner}.source {self.source!r:.80} is unknown: use stdlib, files:GLOB or hf:NAME (a "
            "folder is files:FOLDER)",
        )
        require(
            self.tokenizer == "bytes" or re.fullmatch(BPE, self.tokenizer) is not None,
            f"{owner}.tokenizer {self.tokenizer!r:.80} is unknown: use bytes or bpe:N",
        )
        require(
            self.vocabulary >= BYTE_VOCABULARY,
            f"{owner}.tokenizer '{self.tokenizer}' is too small: bpe:N needs N of at least "
            f"{BYTE_VOCABULARY} (256 bytes and 2 special tokens)",
        )
        positive(owner, self, "length")
        require(
            self.validation_tokens > 1,
            f"{owner}.validation_tokens is {self.validation_tokens}: it must be at least 2, as the "
            "first token of a document stands for no text",
        )
        strict_fraction(owner, self, "validation_fraction")

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the tokenizer may produce."""
        return BYTE_VOCABULARY if self.tokenizer == "bytes" else int(self.tokenizer[4:])
