"""The corpus that data.source names: `stdlib`, `files:GLOB` or `hf:NAME`."""

from moe_jax.base.errors import UserError
from moe_jax.data.documents import Corpus, Document, Opening, moved, sample, split
from moe_jax.data.files import glob_corpus, stdlib_corpus
from moe_jax.data.hub import HubCorpus

__all__ = ["Corpus", "Document", "Opening", "moved", "open_corpus", "sample", "split"]


def open_corpus(source: str, text_field: str = "text", how: Opening | None = None) -> Corpus:
    """Opens a corpus. Files that have changed since the last time are read, for their hashes.

    `text_field` is the column that holds the text, for `hf:` only. `how`: None for no cache.
    UserError: the source is unknown, matches nothing, holds no text or cannot be read.
    """
    how = how or Opening()
    kind, _, argument = source.partition(":")
    if source == "stdlib":
        return stdlib_corpus(how)
    if kind == "files" and argument:
        return glob_corpus(argument, how)
    if kind == "hf" and argument:
        return HubCorpus(argument, text_field, how)
    raise UserError(f"data.source '{source}' is unknown: use stdlib, files:GLOB or hf:NAME")
