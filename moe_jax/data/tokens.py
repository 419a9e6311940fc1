"""A corpus as memory-mapped arrays of tokens, made once and stored in the cache folder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from moe_jax.base.console import progress
from moe_jax.base.errors import UserError
from moe_jax.base.hashes import digest
from moe_jax.config import DataConfig
from moe_jax.data.cache import HashIndex, cache_folder, entry, usable
from moe_jax.data.corpus import Corpus, Opening, moved, open_corpus, sample, split
from moe_jax.data.tokenizer import LONGEST_PIECE, Tokenizer, make_tokenizer
from moe_jax.data.writer import open_split, write_split

VERSION = "1"
"""Part of every cache key: raise it when the stored format or the tokenizer's training changes."""
SPLITS = ("train", "validation")

Utf8 = bytes  # TokenArray has a field named `bytes`


@dataclass(frozen=True)
class TokenArray:
    """Documents one after another, each stored as [bos, tokens…, eos].

    `tokens`: uint16 or uint32 [tokens], memory-mapped, so the corpus may be larger than memory.
    `starts`: int64[documents], index of each document's bos.
    `bytes`: UTF-8 bytes of text that the tokens stand for.
    """

    tokens: np.ndarray
    starts: np.ndarray
    bytes: int
    tokenizer: Tokenizer

    def chunks(self, tokens: int = 1 << 20) -> Iterator[Utf8]:
        """The text of all documents as UTF-8, decoded `tokens` tokens at a time."""
        for start in range(0, len(self.tokens), tokens):
            yield self.tokenizer.decode_bytes(self.tokens[start : start + tokens])

    def first(self, limit: int) -> "TokenArray":
        """The first `limit` tokens, or all if there are fewer."""
        if len(self.tokens) <= limit:
            return self
        tokens = self.tokens[:limit]
        lengths = self.tokenizer.byte_lengths[tokens]
        starts = self.starts[self.starts < limit]
        return TokenArray(tokens, starts, int(lengths.sum()), self.tokenizer)

    def text(self) -> Utf8:
        """The text of all documents, with nothing between them, as UTF-8."""
        return b"".join(self.chunks())


@dataclass(frozen=True)
class TokenData:
    """A tokenised corpus.

    `validation`: the held-out split, cut to data.validation_tokens.
    `fingerprint`: hash of the corpus, its split and the tokenizer. Equal ones mean equal tokens.
    `stats`: counts of the whole splits, {"train" and "validation": {"documents", "bytes",
    "tokens"}, "replaced": documents that had bytes which are no valid UTF-8}.
    `split_by_names`: the fingerprint that this text had when copies of a text were split by their
    names. It equals `fingerprint` where no text is there twice, or none of them changes its side.
    """

    train: TokenArray
    validation: TokenArray
    tokenizer: Tokenizer
    fingerprint: str
    stats: dict[str, Any]
    split_by_names: str


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer | None = None,
    say: Callable[[str], None] = print,
) -> TokenData:
    """The tokens of a corpus, from the cache, or else made now and stored there.

    `tokenizer`: the one to use, as a continued run has its own. Without it, one of the kind
    `config.tokenizer` is trained on the training documents. UserError: the corpus or the cache
    folder cannot be used.
    """
    cache = cache_folder(config.cache)
    with usable(cache):
        corpus = open_corpus(config.source, config.text_field, Opening(cache, config.binary, say))
        # Two keys, because the tokenizer is itself made from the content. Tokens depend on both.
        key = _content_key(config, corpus, cache, say)
        content = digest(VERSION, *key)
        if tokenizer is None:
            tokenizer = _trained(config, corpus, cache, content, say)
        fingerprint = digest(content, tokenizer.fingerprint)
        folder = cache / f"tokens-{fingerprint}"
        build = partial(_tokenise, corpus, config.validation_fraction, tokenizer, say=say)
        stats = entry(folder, build, say)
        train, validation = (_open(folder, name, tokenizer, stats[name]) for name in SPLITS)
    held_out = _held_out(validation, config.validation_tokens)
    by_names = digest(digest(VERSION, *key[:2]), tokenizer.fingerprint)
    return TokenData(train, held_out, tokenizer, fingerprint, stats, by_names)


def _content_key(
    config: DataConfig, corpus: Corpus, cache: Path, say: Callable[[str], None]
) -> list[str]:
    """Everything that decides the text of the two splits."""
    fraction = config.validation_fraction
    index = HashIndex(cache, f"split of {config.source}", say)
    compute = partial(moved, corpus, fraction)
    elsewhere = index.recall(repr(fraction), [corpus.fingerprint], compute)
    index.save()
    # Names and fraction decide the split where no text is there twice.
    return [corpus.fingerprint, repr(fraction), *([elsewhere] if elsewhere else [])]


def _held_out(validation: TokenArray, limit: int) -> TokenArray:
    """The first tokens of the held-out split. UserError: they hold no text."""
    held_out = validation.first(limit)
    if held_out.bytes == 0:
        lengths = validation.tokenizer.byte_lengths
        needed = next(i for i, token in enumerate(validation.tokens, 1) if lengths[token])
        raise UserError(
            f"data.validation_tokens is {limit}: the first {limit} held-out tokens hold no text, "
            f"it must be at least {needed}"
        )
    return held_out


def _trained(
    config: DataConfig, corpus: Corpus, cache: Path, content: str, say: Callable[[str], None]
) -> Tokenizer:
    """A tokenizer of the configured kind, from the cache, or trained on the training documents.

    Held-out documents are left out: a tokenizer that knows them would flatter the evaluation.
    """
    if config.tokenizer == "bytes":
        return make_tokenizer("bytes", ())

    def build(folder: Path) -> dict[str, Any]:
        held_out = split(corpus, config.validation_fraction)
        texts = sample(corpus, np.flatnonzero(~held_out))
        trained = make_tokenizer(config.tokenizer, texts, say)
        (folder / "tokenizer.json").write_text(trained.to_json())
        return {}

    folder = cache / f"tokenizer-{digest(content, config.tokenizer, str(LONGEST_PIECE))}"
    entry(folder, build, say)
    return Tokenizer.from_json((folder / "tokenizer.json").read_text())


def _tokenise(
    corpus: Corpus,
    validation_fraction: float,
    tokenizer: Tokenizer,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes both splits into `folder` and returns their statistics."""
    held_out = split(corpus, validation_fraction)
    say(f"tokenising {corpus.sizes.sum() / 1e6:.1f} MB of text in {len(held_out)} documents")
    began = perf_counter()
    stats: dict[str, Any] = {"replaced": 0}
    with progress("tokenising", int(corpus.sizes.sum())) as advance:
        for name, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
            documents = (corpus.read(int(index)) for index in np.flatnonzero(chosen))
            counts = write_split(folder, name, chain.from_iterable(documents), tokenizer, advance)
            stats["replaced"] += counts.pop("replaced")
            stats[name] = counts
    _report(stats, perf_counter() - began, say)
    return stats


def _report(stats: dict[str, Any], seconds: float, say: Callable[[str], None]) -> None:
    tokens, text = (sum(stats[name][key] for name in SPLITS) for key in ("tokens", "bytes"))
    say(f"{tokens} tokens, {text / tokens:.2f} bytes each, in {seconds:.1f} s")
    if stats["replaced"]:
        say(f"{stats['replaced']} documents have bytes that are no UTF-8: replaced by U+FFFD")


def _open(folder: Path, name: str, tokenizer: Tokenizer, stats: dict[str, int]) -> TokenArray:
    tokens, starts = open_split(folder, name, tokenizer)
    return TokenArray(tokens, starts, stats["bytes"], tokenizer)
