"""Corpora of the Hugging Face hub, or of a local folder in one of its formats."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.base.errors import UserError
from moe_jax.data.cache import HashIndex
from moe_jax.data.documents import Corpus, Document, digest_all


class HubCorpus(Corpus):
    """The rows of a data set's train split, one document each, named by their number.

    Rows are memory-mapped from Arrow files. A missing text counts as empty. UserError: the data set
    cannot be loaded, or it has no such column of strings.
    """

    def __init__(self, source: str, text_field: str):
        dataset = _load(source)
        import pyarrow.compute  # comes with datasets, so only after _load has found it

        self._identity = (source, text_field, dataset._fingerprint)
        self._column = _text_column(dataset, source, text_field)
        # Arrow counts the bytes of all rows without making Python strings.
        lengths = pyarrow.compute.binary_length(self._column)  # pyright: ignore
        self.sizes = lengths.fill_null(0).to_numpy().astype(np.int64)
        if not self.sizes.any():
            raise UserError(f"data.source 'hf:{source}' has no text in column '{text_field}'")

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Iterator[Document]:
        yield Document(str(index), self._text(index))

    def excerpt(self, index: int, start: int, size: int) -> str:
        data = self._text(index).encode()
        return data[start : start + size].decode("utf-8", "ignore")

    def fingerprint(self, cache: Path) -> str:
        # The library's own fingerprint depends on the machine, so it only tells whether the hash
        # of the rows that this machine remembers is still right.
        *name, version = self._identity
        index = HashIndex(cache, f"hf:{name}")
        content = index.hash("train", [version], self._content_hash)
        index.save()
        return content

    def _content_hash(self) -> str:
        chunks = (chunk.to_pylist() for chunk in self._column.chunks)
        return digest_all(text or "" for chunk in chunks for text in chunk)

    def _text(self, index: int) -> str:
        return self._column[index].as_py() or ""


def _load(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.source 'hf:{source}' needs a further package: pip install 'moe_jax[hf]'"
        ) from error
    DatasetsError = datasets.exceptions.DatasetsError  # pyright: ignore
    try:
        return datasets.load_dataset(os.path.expanduser(source), split="train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())  # the library's messages have several lines
        raise UserError(
            f"cannot load data.source 'hf:{source}': {reason} (check the network and the name, "
            "whose data set needs a train split, or name a local folder)"
        ) from error


def _text_column(dataset: Any, source: str, text_field: str) -> Any:
    import pyarrow.types

    if text_field not in dataset.column_names:
        raise UserError(
            f"data.source 'hf:{source}' has no column '{text_field}': set --data.text-field to one "
            f"of {', '.join(dataset.column_names)}"
        )
    column = dataset.data.column(text_field)
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        raise UserError(
            f"column '{text_field}' of data.source 'hf:{source}' holds {column.type}: set "
            "--data.text-field to a column of strings"
        )
    return column
