"""The processes that train one run together: how many, which one this is, where they meet."""

import re
from dataclasses import dataclass
from typing import Literal

from moe_jax.base.errors import quote, require
from moe_jax.config.checks import positive

OWNER = "processes"
ADDRESS = r"(?:\[[^\[\]\s]+\]|[^\[\]:\s/]+):\d{1,5}"
"""HOST:PORT. An IPv6 address stands in brackets."""


@dataclass(frozen=True)
class ProcessesConfig:
    """The processes of a run. One is the default, and needs no other setting here.

    With several, every process gets the same command, but for `index`. Each computes on its own
    devices and reads its own share of every batch. All must see the same folder --out."""

    count: int | Literal["auto"] = 1
    """Number of processes. `auto` finds count, index and coordinator in the environment: SLURM,
    Open MPI, or WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT."""
    index: int | None = None
    """Number of this process, from 0."""
    coordinator: str = ""
    """HOST:PORT at which process 0 waits for the others. The port is free on that machine.
    Whoever reaches the port may take part, so it belongs to a private network."""
    timeout: float = 30.0
    """Seconds without a sign of life after which a process is lost, and the others end."""
    patience: float = 300.0
    """Seconds that the processes wait for each other at the start."""

    def __post_init__(self) -> None:
        positive(OWNER, self, "timeout", "patience")
        require(self.timeout >= 1, f"{OWNER}.timeout is {self.timeout}: it must be at least 1")
        require(
            self.count == "auto" or (type(self.count) is int and 1 <= self.count < 2**16),
            f"{OWNER}.count is {quote(self.count)}: use auto, or a number from 1 to {2**16 - 1}",
        )
        if self.coordinator:
            check_address(f"{OWNER}.coordinator", self.coordinator)
        if self.count in (1, "auto"):
            given = [name for name in ("index", "coordinator") if self._is_given(name)]
            require(
                not given,
                f"{OWNER}.{given[0] if given else ''} is set and {OWNER}.count is {self.count}: "
                "several processes need a count of 2 or more, and auto finds both by itself",
            )
            return
        require(
            self.index is not None and 0 <= self.index < self.count,
            f"{OWNER}.index is {self.index}: {OWNER}.count={self.count} processes have the numbers "
            f"from 0 to {self.count - 1}",
        )
        require(
            self.coordinator != "",
            f"{OWNER}.count={self.count} needs {OWNER}.coordinator: HOST:PORT of process 0, the "
            "same for all",
        )

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) not in (None, "")


def check_address(name: str, text: str) -> None:
    """UserError, in a line that begins with `name`: the text is no HOST:PORT."""
    good = re.fullmatch(ADDRESS, text, re.ASCII) is not None
    require(
        good and 0 < int(text.rpartition(":")[2]) < 2**16,
        f"{name} {quote(text)} is no HOST:PORT, such as node01:9000",
    )
