"""Corpora of the Hugging Face hub, or of a local folder in one of its formats."""

import glob
import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from moe_jax.base.console import downloading
from moe_jax.base.errors import UserError, require
from moe_jax.base.hashes import digest, digest_all
from moe_jax.data.cache import HashIndex
from moe_jax.data.documents import Corpus, Document, Opening

ROWS = 1000
"""Rows that are made Python strings at once."""

DAMAGED = "the stored rows of hf:{} are damaged ({}): making them again"
"""The line on a damaged copy: name and reason."""


class HubCorpus(Corpus):
    """The rows of a data set's train split, one document each, named by their number.

    Rows are memory-mapped from Arrow files. A missing text counts as empty. UserError: the data set
    cannot be loaded, or it has no such column of strings.
    """

    def __init__(self, source: str, text_field: str, how: Opening):
        self._source = source
        self._text_field = text_field
        self._how = how
        self._open(_load(source, how.say))
        if not self.sizes.any():
            raise UserError(f"data.source 'hf:{source}' has no text in column '{text_field}'")

    def _open(self, dataset: Any) -> None:
        import pyarrow.compute  # comes with datasets, so only after _load has found it

        self._version = dataset._fingerprint
        self._column = _text_column(dataset, self._source, self._text_field)
        # Arrow counts the bytes of all rows without making Python strings.
        lengths = pyarrow.compute.binary_length(self._column)  # pyright: ignore
        self.sizes = lengths.fill_null(0).to_numpy().astype(np.int64)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Iterator[Document]:
        yield Document(str(index), self._text(index))

    def excerpt(self, index: int, start: int, size: int) -> str:
        data = self._text(index).encode()
        return data[start : start + size].decode("utf-8", "ignore")

    @cached_property
    def fingerprint(self) -> str:
        if self._how.cache is None:
            return self._hashes[0]
        # The library's own fingerprint depends on the machine, so it only tells whether the hash
        # of the rows that this machine remembers is still right.
        name = [self._source, self._text_field]
        index = HashIndex(self._how.cache, f"hf:{name}", self._how.say)
        content = index.recall("train", [self._version], lambda: self._hashes[0])
        index.save()
        return content

    def contents(self) -> np.ndarray:
        if self._hashes[0] != self.fingerprint:
            # Arrow files have no checksum. The library's own version is that of its sources.
            self._how.say(DAMAGED.format(self._source, "its text is not what it was"))
            self._open(_load(self._source, self._how.say, again=True))
            del self._hashes  # computed anew when it is asked for
        require(
            self._hashes[0] == self.fingerprint,
            f"data.source 'hf:{self._source}' reads differently each time: check the disk",
        )
        return self._hashes[1]

    @cached_property
    def _hashes(self) -> tuple[str, np.ndarray]:
        """Of all texts together, and of each one: one reading of the column."""
        each = np.zeros(len(self.sizes), np.uint64)

        def texts() -> Iterator[str]:
            rows = (text for chunk in self._column.chunks for text in _strings(chunk))
            for index, text in enumerate(rows):
                each[index] = int(digest(text)[:16], 16)
                yield text

        return digest_all(texts()), each

    def _text(self, index: int) -> str:
        return self._column[index].as_py() or ""


def _strings(chunk: Any) -> Iterator[str]:
    """The texts of a chunk, some at a time: a chunk may be large."""
    for begin in range(0, len(chunk), ROWS):
        yield from (text or "" for text in chunk.slice(begin, ROWS).to_pylist())


def _load(source: str, say: Callable[[str], None], again: bool = False) -> Any:
    """The rows. `again`: prepared anew from what was downloaded, not from the library's copy."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.source 'hf:{source}' needs a further package: pip install 'moe_jax[hf]'"
        ) from error
    path = os.path.expanduser(source)
    require(
        not (os.path.isdir(path) and glob.has_magic(os.path.abspath(path))),
        f"data.source 'hf:{source}' has one of * ? [ in its path, which its library takes for a "
        "pattern: rename the folder",
    )
    mode = {"download_mode": "reuse_cache_if_exists"} if again else {}
    DatasetsError = datasets.exceptions.DatasetsError  # pyright: ignore
    try:
        with downloading(f"loading hf:{source}", datasets.disable_progress_bars):
            return datasets.load_dataset(path, split="train", **mode)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())  # the library's messages have several lines
        if _is_damage(error) and not again:
            say(DAMAGED.format(source, reason))
            return _load(source, say, again=True)
        raise UserError(
            f"cannot load data.source 'hf:{source}': {reason} (check the network and the name, "
            "whose data set needs a train split, or name a local folder)"
        ) from error


def _is_damage(error: Exception) -> bool:
    """Whether the library could not read the copy of the rows that it has made."""
    from pyarrow import ArrowException

    # It is JSON that describes the copy.
    return isinstance(error, ArrowException | json.JSONDecodeError | FileNotFoundError)


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
