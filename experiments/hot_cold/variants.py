"""The ways of holding experts that run.py compares, all over the same trained model."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.base.errors import UserError
from moe_jax.placement.decode import TieredDecoder
from moe_jax.placement.files import ExpertFiles
from moe_jax.placement.policy import ONLINE, make_policy
from moe_jax.placement.store import ExpertStore
from moe_jax.placement.traffic import Traffic
from moe_jax.runs.load import Trained

POLICY = "successor"
"""The policy with the most hits on the recorded trace (traces.py)."""
BUDGETS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Resident experts as a part of all of them."""


@dataclass
class Variant:
    """One way of holding the experts, and its measurements."""

    name: str
    decoder: TieredDecoder
    seconds: list[float] = field(default_factory=list)
    """Seconds a token, one entry a round."""
    logits: list[np.ndarray] = field(default_factory=list)
    """float32[1, V] of every token of the first round."""

    @property
    def traffic(self) -> Traffic:
        """Counts of the store since the warm-up."""
        return self.decoder.store.traffic

    @property
    def host(self) -> bool:
        """Whether the tier below is pinned host memory, and not the disk."""
        return self.decoder.store.host_budget > 0


def open_files(folder: Path) -> tuple[ExpertFiles, str]:
    """(the experts, how they are read): around the page cache where the file system allows it."""
    try:
        return ExpertFiles(folder, direct=True), "O_DIRECT"
    except UserError:
        return ExpertFiles(folder), "through the page cache: this file system has no O_DIRECT"


class VariantBuilder:
    """Makes variants of one trained model. `stack` closes their stores.

    Every layer has its quota of residents. In a common pool, layers that take turns push each other
    out.
    """

    def __init__(self, run: Trained, folder: Path, stack: ExitStack) -> None:
        self.run = run
        self.folder = folder
        self.stack = stack
        self.model = run.config.model
        self.layers = self.model.moe_layers
        self.total = self.layers * self.model.moe.experts

    def make(
        self,
        name: str,
        policy: str,
        slots: int,
        *,
        look_ahead: int = 0,
        folder: Path | None = None,
        **choices: Any,
    ) -> Variant:
        """A variant with `slots` resident experts. `choices` are ExpertStore's."""
        files, _ = open_files(folder or self.folder)
        # The static policy keeps the experts that were used most, here all of them.
        frequency = np.ones(self.total) if policy == "static" else None
        store = ExpertStore(
            files,
            make_policy(policy, self.total, self.layers, frequency),
            device_bytes=slots * files.expert_bytes,
            working_set=self.model.moe.experts_per_token,
            look_ahead=look_ahead,
            scope="quota",
            **choices,
        )
        self.stack.enter_context(store)
        if policy == "static" or choices.get("host_bytes"):
            store.fill()
        decoder = TieredDecoder(
            self.model,
            self.run.state.parameters,
            self.run.state.router,
            store,
            look_ahead=look_ahead > 0,
        )
        return Variant(name, decoder)


def all_variants(run: Trained, folder: Path, stack: ExitStack) -> Iterator[Variant]:
    """The variants, in the order in which a round runs them.

    all_resident, and the same in float32. Every online policy at 25%. POLICY at every budget. The
    controls at 25% and 50%: no look-ahead, naive, blocking copies. The other choices on a miss.
    """
    builder = VariantBuilder(run, folder, stack)
    total = builder.total
    per_token = builder.model.moe.experts_per_token
    host_bytes = total * open_files(folder)[0].expert_bytes
    yield builder.make("all_resident", "static", total)
    yield builder.make("all_resident_float32", "static", total, folder=folder / "float32")
    yield builder.make("naive", "lru", per_token, blocking=True)
    for policy in ONLINE:
        yield builder.make(f"{policy}_at_25", policy, total // 4, look_ahead=1)
    yield builder.make("blocking_at_25", POLICY, total // 4, look_ahead=1, blocking=True)
    for budget in BUDGETS:
        # A token's own experts must fit, whatever the budget.
        slots = max(per_token, round(budget * total))
        share = f"{100 * budget:.0f}"
        if budget != 0.25:  # the loop over ONLINE has it
            yield builder.make(f"{POLICY}_at_{share}", POLICY, slots, look_ahead=1)
        if budget not in (0.25, 0.5):
            continue
        yield builder.make(f"no_look_ahead_at_{share}", POLICY, slots)
        for on_miss in ("copy", "compute"):
            name = f"host_{on_miss}_at_{share}"
            yield builder.make(name, POLICY, slots, host_bytes=host_bytes, on_miss=on_miss)
    low_bit, _ = open_files(folder / "low-bit")
    yield builder.make("low_bit_at_25", POLICY, total // 4, low_bit=low_bit, low_bit_share=0.25)
