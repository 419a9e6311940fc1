"""From the variants' times to measurements: ratios of speeds, ceilings, and distances of logits."""

import numpy as np

from experiments.hot_cold.rounds import Rounds
from experiments.hot_cold.variants import POLICY, Variant
from moe_jax.base.result import Measurement
from moe_jax.placement.place import belady
from moe_jax.placement.policy import ONLINE
from moe_jax.placement.store import READERS
from moe_jax.study.rounds import speedup

Row = tuple[str, float | None, str, str | None]
"""name, value, unit, baseline"""


def ratio(one: Variant, other: Variant) -> float:
    """Speed of one over the other's, the median over rounds."""
    return speedup(one.seconds, other.seconds)


class Comparison:
    """All variants after their rounds."""

    def __init__(self, variants: list[Variant], rounds: Rounds) -> None:
        self.by_name = {v.name: v for v in variants}
        self.steps = rounds.steps
        self.links = rounds.links
        self.full = self.by_name["all_resident"]
        self.naive = self.by_name["naive"]
        self.float32 = self.by_name["all_resident_float32"]
        self.tokens = len(self.steps) // self.full.decoder.config.moe_layers
        self.expert_bytes = self.full.decoder.store.files.expert_bytes

    def missed_bytes(self, v: Variant) -> float:
        """Bytes a token of experts that were not resident and had to be brought.

        Experts that were computed in the tier below are not brought.
        """
        absent = v.traffic.uses - v.traffic.hits - v.traffic.computed
        return absent * self.expert_bytes / self.tokens

    def of_ceiling(self, v: Variant) -> float:
        """Speed over the ceiling's, the median over rounds.

        The ceiling is max(compute, missed bytes / bandwidth) a token: computation and copies of a
        perfect overlap. Compute is the all-resident time of the same round.
        """
        missed = self.missed_bytes(v)
        rounds = zip(self.full.seconds, self.links, strict=True)
        ceiling = [max(full, missed / link.of(v)) for full, link in rounds]
        return speedup(v.seconds, ceiling)

    def ceiling(self, v: Variant) -> float:
        """The ceiling's speed over all_resident's."""
        return ratio(v, self.full) / self.of_ceiling(v)

    def of_belady(self, v: Variant) -> float:
        """Hits over the most that so many residents can have (Belady's optimum)."""
        model = v.decoder.config
        residents = v.decoder.store.residency.placement.capacity
        bound = belady(self.steps, model.moe_layers, model.moe.experts, residents)
        return v.traffic.hit_rate / max(bound.hit_rate, 1e-9)

    def best(self, share: int) -> Variant:
        """The fastest variant from disk at this percentage of residents that gives the same bits.

        Its copies are asynchronous.
        """
        names = [f"{name}_at_{share}" for name in (*ONLINE, "no_look_ahead")]
        variants = [self.by_name[name] for name in names if name in self.by_name]
        return max(variants, key=lambda v: ratio(v, self.full))

    def exact(self) -> bool:
        """Whether the logits of all variants that should agree are the same bits.

        Exempt are low-bit copies, experts in float32, and experts that another processor than the
        device computes.
        """
        expected = np.stack(self.full.logits)
        for v in self.by_name.values():
            store = v.decoder.store
            same_processor = store.unified or not store.tiers.compute_in_host
            if v is self.float32 or store.low_bit is not None or not same_processor:
                continue
            if not np.array_equal(np.stack(v.logits), expected):
                return False
        return True

    def divergence(self, one: Variant, other: Variant) -> float:
        """Mean KL(one || other) of the next-token distributions, in nats a token."""
        log_p = _log_probabilities(one)
        log_q = _log_probabilities(other)
        return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))

    def link(self, name: str) -> float:
        """Bandwidth of `disk` or `host`, the median over rounds."""
        return float(np.median([getattr(link, name) for link in self.links]))


def _log_probabilities(v: Variant) -> np.ndarray:
    """float64[tokens, V]: in float32 the differences of the distributions would be lost."""
    logits = np.stack(v.logits)[:, 0].astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def describe(c: Comparison, seed: int) -> list[Measurement]:
    """All measurements, first those that compare variants."""
    rows = [*main_rows(c)]
    for v in c.by_name.values():
        rows += variant_rows(c, v)
    return [Measurement(*row, seeds=[seed]) for row in rows]


def main_rows(c: Comparison) -> list[Row]:
    """The figures that the verdict and README.md name."""
    at_25 = c.best(25)
    at_50 = c.best(50)
    without = c.by_name["no_look_ahead_at_25"]
    online = [*(c.by_name[f"{policy}_at_25"] for policy in ONLINE), without]
    overlap = ratio(c.by_name[f"{POLICY}_at_25"], c.by_name["blocking_at_25"])
    of_belady_at_50 = c.of_belady(c.by_name["no_look_ahead_at_50"])
    low_bit_kl = c.divergence(c.full, c.by_name["low_bit_at_25"])
    base = "all experts resident"
    float32 = "all experts resident in float32"
    return [
        ("decode_of_all_resident_at_50", ratio(at_50, c.full), f"ratio ({at_50.name})", base),
        ("decode_of_all_resident_at_25", ratio(at_25, c.full), f"ratio ({at_25.name})", base),
        ("decode_of_ceiling_at_50", c.of_ceiling(at_50), f"ratio ({at_50.name})", "max"),
        ("decode_of_ceiling_at_25", c.of_ceiling(at_25), f"ratio ({at_25.name})", "max"),
        ("decode_over_naive_at_25", ratio(at_25, c.naive), "ratio of speeds", "naive"),
        ("hits_of_belady_best_online", max(map(c.of_belady, online)), "fraction, 25%", "Belady"),
        ("hits_of_belady_best_online_at_50", of_belady_at_50, "fraction", "Belady"),
        ("exact", int(c.exact()), "1: all logits bit for bit equal", base),
        ("async_over_blocking_at_25", overlap, "ratio", "blocking"),
        ("float32_of_all_resident", ratio(c.float32, c.full), "ratio of speeds", base),
        ("decode_of_float32_all_resident_at_25", ratio(at_25, c.float32), "ratio", float32),
        ("decode_of_float32_all_resident_at_50", ratio(at_50, c.float32), "ratio", float32),
        ("rounding_kl", c.divergence(c.float32, c.full), "nats/token", "experts in float32"),
        ("low_bit_kl", low_bit_kl, "nats/token", "exact"),
        ("read_bandwidth", c.link("disk"), f"bytes/s, {READERS} threads, checked", None),
        ("host_bandwidth", c.link("host"), "bytes/s, host memory to device", None),
        ("expert_bytes", c.expert_bytes, "bytes", None),
    ]


def variant_rows(c: Comparison, v: Variant) -> list[Row]:
    """Speed, hits and traffic of one variant."""
    traffic = v.traffic
    uses = max(1, traffic.uses)
    waited = 1e3 * traffic.waited / c.tokens
    values: list[Row] = [
        ("tokens_per_second", 1 / float(np.median(v.seconds)), "tokens/s", None),
        ("of_all_resident", ratio(v, c.full), "ratio of speeds", "all experts resident"),
        ("of_ceiling", c.of_ceiling(v), "ratio", "max"),
        ("hit_rate", traffic.hit_rate, "fraction", None),
        ("ahead_rate", traffic.ahead / uses, "fraction", None),
        ("recall", v.decoder.store.residency.ahead.recall, "fraction, at the end", None),
        ("disk_bytes_per_token", traffic.disk_bytes / c.tokens, "bytes", None),
        ("waited", waited, "ms a token, for reads and copies", None),
        ("peak_expert_bytes", traffic.peak_bytes, "bytes", None),
    ]
    return [(f"{v.name}.{name}", value, unit, base) for name, value, unit, base in values]
