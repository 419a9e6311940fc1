"""The corpus that data.source names: `stdlib`, `files:GLOB` or `hf:NAME`."""

from moe_jax.base.errors import UserError
from moe_jax.data.documents import Corpus, Document, sample, split
from moe_jax.data.files import glob_corpus, stdlib_corpus
from moe_jax.data.hub import HubCorpus

__all__ = ["Corpus", "Document", "open_corpus", "sample", "split"]


def open_corpus(source: str, text_field: str = "text") -> Corpus:
    """Opens a corpus without reading its text.

    `text_field` is the column that holds the text, for `hf:` only. UserError: the source is
    unknown, matches nothing, holds no text or cannot be read.
    """
    kind, _, argument = source.partition(":")
    if source == "stdlib":
        return stdlib_corpus()
    if kind == "files" and argument:
        return glob_corpus(argument)
    if kind == "hf" and argument:
        return HubCorpus(argument, text_field)
    raise UserError(f"data.source '{source}' is unknown: use stdlib, files:GLOB or hf:NAME")
