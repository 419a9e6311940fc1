"""Tokenizers that lose nothing: single bytes, or byte-level BPE (Sennrich et al. 2016)."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_jax.base.console import working
from moe_jax.base.errors import UserError, quote, reading, require
from moe_jax.base.hashes import digest

MOST_IDS = 1 << 24
SPECIALS = 2
"""The last two ids of a tokenizer made here are bos and eos. No text is ever encoded as one."""

PATTERN = "|".join(
    (
        r"(?:\r?\n)+[ \t]*",  # newlines and the indentation after them are one piece
        r"'(?:[sdmt]|ll|ve|re)\b",  # English contractions
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word and what stands before it: " the", ".join", "_name"
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+",  # operators and punctuation
        r"[^\S\r\n]+(?!\S)|\s+",  # other white space, without the blank that goes to a word
    )
)
"""Pieces that no token crosses: GPT-4's, except that a newline takes the indentation after it."""
LONGEST_PIECE = 256
"""Characters of a piece in training. The time of training grows with the square of the longest
piece, and encoded data without any space is one piece. Encoding takes pieces of every length."""


class Tokenizer:
    """Text to ids and back: decode(encode(text)) == text for every valid Unicode text.

    `kind`: `bytes` or `bpe:N`, as in DataConfig.tokenizer.
    `vocabulary` (V): every id is below it. BPE trained on little text leaves some ids unused.
    `bos`, `eos`: ids that open and close a document.
    `silent`: ids that stand for no text although the model has a string for them.
    `byte_lengths`: int64[V], UTF-8 bytes that a token stands for, 0 for special and unused ids.
    `fingerprint`: hash of everything that decides the ids.
    """

    def __init__(
        self,
        kind: str,
        vocabulary: int,
        model: tokenizers.Tokenizer | None = None,
        bos: int | None = None,
        eos: int | None = None,
        silent: Sequence[int] = (),
    ):
        """`bos`, `eos`: None for the last two ids. `silent`: ids that stand for no text although
        the model has a string for them, such as the special tokens of a published model."""
        self.kind = kind
        self.vocabulary = vocabulary
        self._model = model
        self.bos = vocabulary - 2 if bos is None else bos
        self.eos = vocabulary - 1 if eos is None else eos
        self.silent = sorted(silent)
        self._bytes = _byte_strings(model, vocabulary, frozenset(silent))
        self.byte_lengths = np.array([len(data) for data in self._bytes], np.int64)

    def encode(self, text: str) -> np.ndarray:
        """int32[tokens], without bos and eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel threads."""
        if self._model is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        return [np.array(code.ids, np.int32) for code in self._model.encode_batch_fast(list(texts))]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text that ids stand for. Bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for: none for special ids and ids outside the vocabulary."""
        # A list and not an iterator, because NumPy would make a single object of an iterator.
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
        known = ids[(ids >= 0) & (ids < self.vocabulary)]
        return b"".join([self._bytes[i] for i in known.tolist()])

    def model_fields(self) -> dict[str, Any] | None:
        """The library's own description of the model, a tokenizer.json. None for single bytes."""
        return None if self._model is None else json.loads(self._model.to_str())

    def to_json(self) -> str:
        """The whole tokenizer as text, for a checkpoint."""
        model = self.model_fields()
        fields = {"kind": self.kind, "vocabulary": self.vocabulary, "model": model}
        # Defaults are left out, so that the fingerprints of most tokenizers, which name cache
        # entries, do not depend on these fields.
        if (self.bos, self.eos) != (self.vocabulary - 2, self.vocabulary - 1) or self.silent:
            fields |= {"bos": self.bos, "eos": self.eos, "silent": self.silent}
        return json.dumps(fields)

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """The tokenizer whose `to_json` is `text`. UserError: the text is no such JSON."""
        with reading("the stored tokenizer", "restore the file or train anew"):
            fields = _stored_fields(text)
            model = fields["model"]
            loaded = tokenizers.Tokenizer.from_str(json.dumps(model)) if model else None
            return Tokenizer(
                fields["kind"],
                fields["vocabulary"],
                loaded,
                bos=fields.get("bos"),
                eos=fields.get("eos"),
                silent=fields.get("silent", ()),
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of `to_json`."""
        return digest(self.to_json())


def _stored_fields(text: str) -> dict[str, Any]:
    """The fields of `to_json`, each of its type and in its range."""
    problem = f"this is no stored tokenizer ({quote(text)})"
    try:
        fields = json.loads(text)
    except (ValueError, TypeError) as error:
        raise UserError(f"{problem}: restore the file or train anew") from error
    require(isinstance(fields, dict), problem)
    vocabulary = fields.get("vocabulary")
    # type(), because True is an int. The bound is far above any published vocabulary.
    known = type(vocabulary) is int and 0 < vocabulary <= MOST_IDS
    require(known and isinstance(fields.get("kind"), str), problem)
    require(isinstance(fields.get("model", 0), dict | None), problem)
    silent = fields.get("silent", [])
    require(isinstance(silent, list), f"silent is {quote(silent)}: a list is needed")
    for number in [fields.get("bos", 0), fields.get("eos", 0), *silent]:
        inside = type(number) is int and 0 <= number < vocabulary
        require(inside, f"{quote(number)} is none of its {vocabulary} ids")
    return fields


def make_tokenizer(
    kind: str, texts: Iterable[str], say: Callable[[str], None] = print
) -> Tokenizer:
    """The tokenizer of a kind: `bytes`, or `bpe:N` trained on `texts`, which are streamed.

    `bytes` needs no training and ignores `texts`.
    """
    if kind == "bytes":
        return Tokenizer(kind, 256 + SPECIALS)
    vocabulary = int(kind.removeprefix("bpe:"))
    say(f"training the tokenizer {kind}")
    model = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    cut = pre_tokenizers.Split(tokenizers.Regex(rf"[\s\S]{{1,{LONGEST_PIECE}}}"), "isolated")
    # Without its own regex and its leading blank ByteLevel only maps bytes to characters.
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()  # type: ignore
    model.pre_tokenizer = pre_tokenizers.Sequence([split, cut, to_bytes])  # type: ignore
    with working(f"training the tokenizer {kind}"):
        model.train_from_iterator(texts, _trainer(vocabulary))
    # The stored tokenizer does not cut: its tokens do not depend on where a piece is cut.
    model.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])  # type: ignore
    return Tokenizer(kind, vocabulary, model)


def _trainer(vocabulary: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=vocabulary - SPECIALS,
        min_frequency=2,  # a pair that occurs once is no pattern
        # All 256 bytes, so that every text can be encoded.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,  # console.working does it
    )


def _byte_strings(
    model: tokenizers.Tokenizer | None, vocabulary: int, silent: frozenset[int] = frozenset()
) -> list[bytes]:
    """The bytes that each id stands for: none for special and unused ids."""
    if model is None:
        return [bytes([i]) for i in range(256)] + [b""] * SPECIALS
    strings = [b""] * vocabulary
    values = byte_characters()
    for token, i in model.get_vocab().items():
        require(i < vocabulary, f"token {quote(token)} has id {i}, beyond {vocabulary} ids")
        if i not in silent:
            # Not a plain lookup: a published vocabulary may be of another kind.
            require(
                values.keys() >= set(token),
                f"the tokenizer is no byte-level BPE ({quote(token)} is a token): use a model "
                "that has one",
            )
            strings[i] = bytes(values[character] for character in token)
    return strings


def byte_characters() -> dict[str, int]:
    """Byte-level BPE writes bytes as printable characters (GPT-2's table): character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
