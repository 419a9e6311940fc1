"""Numbers as a person reads them: four digits, groups of three, no exponents where it can be."""

import math

SCALED = {"bytes": "B", "FLOP": "FLOP", "FLOP/s": "FLOP/s"}
"""Units that are written with a prefix, and what follows the prefix."""
PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def number_text(value: float | int | None) -> str:
    """Four digits: "10,350", "0.3494". A dash for a missing value."""
    if value is None:
        return "-"
    rounded = f"{value:.4g}"
    # Python turns to an exponent at 10,000, where a reader counts in thousands.
    return f"{float(rounded):,.0f}" if 1000 <= abs(float(rounded)) < 1e15 else rounded


def amount_text(value: float | int | None, unit: str) -> tuple[str, str]:
    """Number and unit: ("1.585", "GB") for 1,585,131,520 bytes, and others as they are."""
    if value is None or unit not in SCALED or not math.isfinite(value):
        return number_text(value), unit
    size = abs(float(f"{value:.4g}"))
    steps = next((i for i in range(len(PREFIXES)) if size < 1000 ** (i + 1)), len(PREFIXES) - 1)
    if steps == 0:
        return number_text(value), unit
    return number_text(value / 1000**steps), f"{PREFIXES[steps]}{SCALED[unit]}"
