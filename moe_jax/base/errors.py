"""The one exception whose message is meant for the person at the keyboard, and how it is worded."""

import difflib
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

MOST_QUOTED = 80
"""Characters of a foreign value, or of another library's message, in an error line."""
MOST_CHARACTERS = 1000
"""Characters of a whole error line. Only a very long path reaches it."""


class UserError(Exception):
    """Input that cannot be used.

    The message is one line that names the offending value and the fix. Programs print it as
    `error: …` and end with exit code 2. Nothing has been compiled, written or lost by then.
    Characters that would break the line, or that no terminal can show, are escaped.
    """

    def __init__(self, message: str) -> None:
        line = _printable(message)
        if len(line) > MOST_CHARACTERS:
            # The value is at the beginning and the fix at the end: both stay.
            line = f"{line[: MOST_CHARACTERS - 300]} … {line[-290:]}"
        super().__init__(line)


def require(condition: bool, message: str) -> None:
    """UserError(message) if `condition` is false."""
    if not condition:
        raise UserError(message)


class _Short(reprlib.Repr):
    """repr of a value from a file, without the cost of writing a large one out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = MOST_QUOTED
        self.maxother = MOST_QUOTED

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write an integer of more than 4300 digits.
        return repr(x) if x.bit_length() <= 256 else f"a number of {x.bit_length()} bits"


def quote(value: Any) -> str:
    """A foreign value as Python writes it, escaped, in at most MOST_QUOTED characters."""
    # A string is cut before it is escaped, because reprlib would leave out its middle.
    text = repr(value[:MOST_QUOTED]) if isinstance(value, str | bytes) else _Short().repr(value)
    return brief(text)


def brief(text: object, most: int = MOST_QUOTED) -> str:
    """A foreign name, or the message of another library: one line of at most `most` characters."""
    # Cut first, so that a long text costs nothing. White space only makes it shorter.
    line = _printable(" ".join(str(text)[: 4 * most].split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _printable(text: str) -> str:
    """Every other character escaped: ends of lines, control characters, surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def near_name(name: str, known: Iterable[str]) -> str:
    """` (did you mean …?)` with the known name that is most like `name`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


@contextmanager
def reading(source: object, remedy: str = "fetch the file again") -> Iterator[None]:
    """The one entrance of a reader of files that somebody else wrote.

    Any error inside the block becomes a UserError of one line that names `source`. `remedy` is
    the advice after an error of another library.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or brief(error)}") from error
    except MemoryError as error:
        raise UserError(f"{source} needs more memory than there is: {remedy}") from error
    # A library in Rust that stops in the middle raises a PanicException, which is no Exception.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{source} is damaged ({_reason(error)}): {remedy}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return brief(error) or type(error).__name__
