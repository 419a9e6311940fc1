"""What a corpus leaves out, as one line."""

from collections.abc import Callable

SHOWN = 3
"""Names in the line for each reason."""
LONGEST = 60
"""Characters of a name in the line."""


class LeftOut:
    """Names that are left out, by the reason."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = {}

    def add(self, reason: str, names: list[str]) -> None:
        """Adds names. `reason` follows their number, as in "3 links to …"."""
        if names:
            self._names.setdefault(reason, set()).update(names)

    def tell(self, say: Callable[[str], None]) -> None:
        """Says one line if anything is left out."""
        if self._names:
            parts = (f"{len(names)} {why} ({_few(names)})" for why, names in self._names.items())
            say(f"data.source leaves out {'; '.join(parts)}")


def _few(names: set[str]) -> str:
    shown = [_printable(name) for name in sorted(names)[:SHOWN]]
    return ", ".join([*shown, "…"] if len(names) > SHOWN else shown)


def _printable(name: str) -> str:
    """A name without line breaks and bytes that no terminal can show, cut in the middle."""
    name = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"
