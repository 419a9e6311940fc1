"""Counts the bytes, hits and waits of experts in tiers from one report to the next."""

from typing import Any

import numpy as np
from jaxtyping import Int

from moe_jax.placement.records.host import HostRecords
from moe_jax.train.engines.tiered.threads import Span


class TrafficMeter:
    """Counts uses, hits and bytes since the last `report`."""

    def __init__(self, records: HostRecords) -> None:
        self._records = records
        self._uses = 0
        self._hits = 0
        self._reported = self._bytes()

    def used(self, active: Int[np.ndarray, "n"], resident: Int[np.ndarray, "R"]) -> None:
        """A layer's `active` experts were used, of which the `resident` ones were hits."""
        self._uses += len(active)
        self._hits += int(np.isin(active, resident).sum())

    def report(self, spans: list[Span]) -> dict[str, Any]:
        """The counts under their names in metrics.jsonl. It then counts from zero."""
        now = self._bytes()
        counts = {name: value - self._reported[name] for name, value in now.items()}
        hit_rate = self._hits / self._uses if self._uses else 1.0
        self._reported = now
        self._uses = 0
        self._hits = 0
        return {
            **counts,
            "expert_hit_rate": hit_rate,
            "expert_wait_seconds": sum(s.end - s.begin for s in spans if s.what == "wait"),
        }

    def _bytes(self) -> dict[str, int]:
        disk = self._records.store.moved
        host = self._records.moved
        return {
            "disk_read_bytes": disk.read,
            "disk_written_bytes": disk.written,
            "host_read_bytes": host.read,
            "host_written_bytes": host.written,
        }
