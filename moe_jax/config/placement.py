"""Where the routed experts live: in device memory, in host memory or on disk.

One config for training and one for decoding. Budgets are sizes as parse_bytes reads them.
"""

from dataclasses import dataclass, field
from typing import Literal

from moe_jax.base.errors import require
from moe_jax.config.checks import byte_size, fraction, known_choices, parse_bytes
from moe_jax.config.codec import MAY_DIFFER

OWNER = "placement"

PolicyName = Literal["lru", "lfu", "decayed_lfu", "lfru", "successor"]
"""Who stays on the device: the policies of placement/policy.py that learn as they go."""
OnMiss = Literal["copy", "compute", "cheaper"]
"""How an expert that is in host memory is used: copied to the device, computed in host memory, or
whichever of the two was faster for as many tokens when the store was opened."""


@dataclass(frozen=True)
class PlacementConfig:
    """Where the routed experts live while a model is trained (train/engines/tiered).

    Sizes are written like 2GB, 512MB, 1.5GiB, or as plain bytes. Budgets and policies change the
    speed of a run, never its results."""

    device_budget: str = field(default="", metadata=MAY_DIFFER)
    """Device memory for the routed experts, such as 2GB. Unset, all of them stay on the device.
    It covers parameters, optimizer moments and gradients, also those of the layer at work.
    The other experts are in host memory or on disk and are copied when a layer needs them."""
    host_budget: str = field(default="", metadata=MAY_DIFFER)
    """Host memory for experts that the device has no room for, such as 8GB. Unset, none.
    The most used ones come first. The others are on disk."""
    policy: PolicyName = field(default="decayed_lfu", metadata=MAY_DIFFER)
    """Which experts stay on the device, by their use so far (placement/policy.py)."""
    mode: Literal["sparse", "exact"] = "sparse"
    """How an update treats experts that no token chose.
    `sparse` leaves them alone: no decay of their moments and no weight decay (lazy AdamW).
    `exact` gives the results of training without tiers, and catches up when they are next used."""
    direct: bool = field(default=False, metadata=MAY_DIFFER)
    """Read and write the disk without the operating system's page cache (O_DIRECT, Linux).
    The page cache would use host memory beyond the budget."""
    folder: str = field(default="", metadata=MAY_DIFFER)
    """Folder for the experts on disk during the run. Unset, a folder inside the run's own."""

    def __post_init__(self) -> None:
        known_choices(OWNER, self)
        byte_size(OWNER, self, "device_budget", "host_budget")
        require(
            self.device_budget != "" or self.host_budget == "",
            f"{OWNER}.host_budget={self.host_budget} needs {OWNER}.device_budget: without it "
            "everything stays on the device",
        )

    @property
    def tiered(self) -> bool:
        """Whether some experts live outside device memory."""
        return self.device_budget != ""

    @property
    def device_bytes(self) -> int:
        """The device budget in bytes, 0 where it is unset."""
        return parse_bytes(f"{OWNER}.device_budget", self.device_budget or "0")

    @property
    def host_bytes(self) -> int:
        """The host budget in bytes, 0 where it is unset."""
        return parse_bytes(f"{OWNER}.host_budget", self.host_budget or "0")


@dataclass(frozen=True)
class DecodePlacement:
    """Where the routed experts live while a model decodes.

    Sizes are written like 2GB, 512MB, 1.5GiB, or as plain bytes. Only `dtype` and `low_bit_share`
    change results. On an accelerator, `on_miss` may change their last bits."""

    device_budget: str = ""
    """Device memory for the routed experts, such as 2GB. Unset, it holds all of them.
    The other experts are copied from host memory or disk when a layer needs them."""
    host_budget: str = ""
    """Host memory for experts evicted from the device, such as 8GB. Unset, none.
    The disk always holds all experts."""
    policy: PolicyName = "successor"
    """Which experts stay on the device, by their use so far (placement/policy.py)."""
    look_ahead: int = -1
    """Experts that are prefetched for the next layer, as predicted by its router.
    -1 prefetches one expert for each text of the batch."""
    on_miss: OnMiss = "copy"
    """How an expert in host memory is used.
    `copy` copies it to the device. `compute` computes with it in host memory.
    `cheaper` takes the one that was measured to be faster for its number of tokens."""
    dtype: Literal["", "bfloat16", "float16", "float32"] = ""
    """Type that the routed experts are rounded to, on disk and in memory. Unset, no rounding.
    THIS CHANGES RESULTS, in the same way under every budget.
    bfloat16 takes half the bytes of float32."""
    low_bit_share: float = 0.0
    """Share of a token's total weight, from 0 to 1. 0 never reads 8-bit copies.
    An expert outside device memory is read as its 8-bit copy if its share is smaller for every
    token. THIS CHANGES RESULTS."""

    def __post_init__(self) -> None:
        known_choices(OWNER, self)
        byte_size(OWNER, self, "device_budget", "host_budget")
        fraction(OWNER, self, "low_bit_share")
        require(
            self.look_ahead >= -1,
            f"{OWNER}.look_ahead is {self.look_ahead}: use -1, 0 or a number of experts",
        )
