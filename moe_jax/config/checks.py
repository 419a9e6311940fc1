"""Checks of settings: each raises UserError with the setting's name and value.

`owner` is the dotted name of the config, as the command line spells it. It is empty for the
outermost config, whose fields have no prefix.
"""

import re
from fractions import Fraction
from typing import Any

from moe_jax.base.errors import UserError, near_name, quote, require
from moe_jax.config.codec import choices

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)}


LARGEST = 3.4e38
"""Largest float32, which is what every setting becomes in a computation."""


def _finite(owner: str, name: str, value: float) -> None:
    # NaN passes, and is refused by the comparison that follows, with its own words.
    require(
        not abs(value) > LARGEST,
        f"{_dotted(owner, name)} is {quote(value)}: it must be below {LARGEST}",
    )


def known_choices(owner: str, config: Any) -> None:
    """UserError: a field with a Literal type has none of its values."""
    for name, options in choices(type(config)).items():
        value = getattr(config, name)
        words = ", ".join(map(str, options))
        require(
            value in options,
            f"{_dotted(owner, name)} is {quote(value)}: use one of {words}"
            f"{near_name(str(value), map(str, options))}",
        )


def positive(owner: str, config: Any, *names: str) -> None:
    """UserError: one of these fields is 0 or less, or no finite float32."""
    for name in names:
        value = getattr(config, name)
        _finite(owner, name, value)
        require(value > 0, f"{_dotted(owner, name)} is {quote(value)}: it must be positive")


def not_negative(owner: str, config: Any, *names: str) -> None:
    """UserError: one of these fields is below 0, or no finite float32."""
    for name in names:
        value = getattr(config, name)
        _finite(owner, name, value)
        require(value >= 0, f"{_dotted(owner, name)} is {quote(value)}: it must not be negative")


def fraction(owner: str, config: Any, *names: str) -> None:
    """UserError: one of these fields is outside [0, 1]."""
    for name in names:
        value = getattr(config, name)
        require(
            0 <= value <= 1,
            f"{_dotted(owner, name)} is {quote(value)}: it must lie between 0 and 1",
        )


def fraction_below_one(owner: str, config: Any, *names: str) -> None:
    """UserError: one of these fields is outside [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{_dotted(owner, name)} is {quote(value)}: it must lie in [0, 1)")


def strict_fraction(owner: str, config: Any, *names: str) -> None:
    """UserError: one of these fields is outside (0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(
            0 < value < 1,
            f"{_dotted(owner, name)} is {quote(value)}: it must lie strictly between 0 and 1",
        )


def byte_size(owner: str, config: Any, *names: str) -> None:
    """UserError: one of these fields is neither empty nor a size that parse_bytes reads."""
    for name in names:
        text = getattr(config, name)
        if text:
            parse_bytes(_dotted(owner, name), text)


def parse_bytes(name: str, text: str) -> int:
    """The number of bytes that a size such as "2GB", "512MB", "1.5GiB" or "4096" stands for.

    The case of the letters does not matter: kB is 1000 bytes and KiB is 1024. The B may be left
    out. UserError, in a line that begins with `name`: the text is no size.
    """
    # Bounded, because Python refuses to read an integer of more than 4300 digits.
    number = r"\d{1,30}(?:\.\d{1,30})?|\.\d{1,30}"
    match = re.fullmatch(rf"({number})\s*([kmgt]?i?)b?", text.strip().lower())
    # The pattern also accepts a lone "i" ("2i"), which is not in the table.
    if match is None or match[2] not in UNITS:
        raise UserError(
            f"{name} {quote(text)} is no size: write it like 2GB, 512MB, 1.5GiB or as plain bytes"
        )
    # A Fraction, because a float makes 8.2MB a byte too few.
    return int(Fraction(match[1]) * UNITS[match[2]])


def _dotted(owner: str, name: str) -> str:
    return f"{owner}.{name}" if owner else name
