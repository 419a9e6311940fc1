"""What a sweep minimises or maximises: measurements of the trials' result.json."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moe_jax.base.errors import require

MAXIMISED = "max:"
"""Before the name of a measurement that is to be high."""


@dataclass(frozen=True)
class Objective:
    """A measurement that is to be low, or high."""

    name: str
    maximise: bool = False

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """As Optuna has it."""
        return "maximize" if self.maximise else "minimize"

    @property
    def sign(self) -> int:
        """A value times this is to be low."""
        return -1 if self.maximise else 1

    @property
    def text(self) -> str:
        """As on the command line."""
        return f"{MAXIMISED if self.maximise else ''}{self.name}"


def parse_objectives(texts: Iterable[str]) -> tuple[Objective, ...]:
    """Reads NAME or max:NAME. UserError: no name, or one that is given twice."""
    found = tuple(
        Objective(text.removeprefix(MAXIMISED), text.startswith(MAXIMISED)) for text in texts
    )
    names = [objective.name for objective in found]
    for name in names:
        require(name != "", "--objective needs the name of a measurement")
        require(names.count(name) == 1, f"--objective {name} is given twice")
    return found
