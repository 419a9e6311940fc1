"""Bytes of a file as text: by its byte-order mark, piece by piece, or a part from the middle."""

import codecs
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO

PIECE_BYTES = 1 << 20
"""Size of the pieces in which a file is read. Several fill one batch of the tokenizer."""
UTF8 = "utf-8"
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Byte-order mark -> encoding. The longer ones come first: one begins with a shorter one."""


def skip_mark(file: BinaryIO) -> str:
    """The encoding that the byte-order mark names: the file is left behind the mark.

    Without a mark it is UTF-8. The mark of UTF-8 is a character of the text and not skipped.
    """
    begin = file.read(4)
    mark = next((mark for mark in MARKS if begin.startswith(mark)), b"")
    file.seek(len(mark))
    return MARKS.get(mark, UTF8)


def blocks_of(file: BinaryIO) -> Iterator[bytes]:
    """The file from here on, piece by piece."""
    return iter(lambda: file.read(PIECE_BYTES), b"")


def utf8_blocks(file: BinaryIO) -> Iterator[bytes]:
    """The text of a whole file as UTF-8. A file in UTF-8 comes as it is, valid or not."""
    encoding = skip_mark(file)
    if encoding == UTF8:
        yield from blocks_of(file)
        return
    for text, _ in pieces(blocks_of(file), encoding):
        yield text.encode()


def text_at(file: BinaryIO, length: int, start: int, size: int) -> str:
    """At most `size` bytes of a file's text, which has `length`, from about byte `start` on.

    All three count the text as UTF-8. For other encodings the place is proportional.
    """
    encoding = skip_mark(file)
    begin = file.tell()
    if encoding != UTF8:
        stored = os.fstat(file.fileno()).st_size - begin
        # 4 bytes, because every character of UTF-32 has them, and one of UTF-16 has 2 or 4.
        start = stored * start // max(1, length) // 4 * 4
    file.seek(begin + start)
    # "ignore" drops characters that the ends cut in two.
    text = file.read(size).decode(encoding, "ignore")
    return text.encode()[:size].decode(UTF8, "ignore")


def pieces(blocks: Iterable[bytes], encoding: str = UTF8) -> Iterator[tuple[str, bool]]:
    """Decodes blocks of text into pieces (text, replaced).

    A block may end anywhere, also inside a character. Joined, the texts are what decoding
    everything at once with errors="replace" gives. `replaced`: a byte was replaced in this piece or
    an earlier one. Pieces end where lines do, if there are lines. At least one piece comes out.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    rest = ""  # decoded text that is not yet in a piece
    count = 0
    for block in blocks:
        cut = _line_end(rest)
        if cut:
            yield rest[:cut], decoder.errors == "replace"
            rest = rest[cut:]
            count += 1
        rest += _decode(decoder, block)
    rest += _decode(decoder, b"", final=True)
    if rest or count == 0:
        yield rest, decoder.errors == "replace"


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, final: bool = False) -> str:
    """Decodes strictly until that fails, and from then on with replacement."""
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError:
        # A decoder that has raised keeps the bytes that were pending before this block, so the
        # block can be decoded again. The decoder's mode also records that it was needed.
        decoder.errors = "replace"
        return decoder.decode(block, final)


def _line_end(text: str) -> int:
    """Where to cut: before the last newlines, or else the last space, or else at the end.

    No token contains both a newline and the text before it (tokenizer.PATTERN), so a cut before
    newlines does not change the tokens.
    """
    end = len(text[: text.rfind("\n") + 1].rstrip("\r\n"))
    return end or max(text.rfind(" "), 0) or len(text)
