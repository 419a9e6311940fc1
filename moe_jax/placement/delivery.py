"""The experts of one fetch: brought, leased to the caller, and settled later."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from moe_jax.placement.lease import Lease
from moe_jax.placement.residency import Source
from moe_jax.placement.tiers import Tiers
from moe_jax.placement.transfers import Loading, failed


class Delivery:
    """What one fetch brings to the device. Experts are numbered layer · E + expert here, but in
    `experts` they are those of `layer`."""

    def __init__(
        self,
        tiers: Tiers,
        layer: int,
        experts: Int[np.ndarray, "n"],
        predicted: dict[int, Loading],
    ) -> None:
        self.layer = layer
        self.experts = experts
        self.passing = dict(predicted)
        """Those that came to the device for this fetch. `settle` decides whether they stay."""
        self.low_bit: dict[int, Loading] = {}
        """Those whose 8-bit copies came instead. They never stay."""
        self.settled = True
        """A fetch that fails keeps nothing, so there is nothing to decide."""
        self._tiers = tiers
        self._leases: dict[int, Lease] = {}

    def bring(
        self, sources: dict[int, Source], arrived: Callable[[int, Lease], None]
    ) -> dict[int, Lease]:
        """Leases on all experts. `arrived` is called for each when it is there."""
        missing = [expert for expert, source in sources.items() if source == "missing"]
        loadings = self._start(sources, missing[:-1])
        ready = {expert: loading for expert, loading in loadings.items() if loading.done()}
        self._lease(ready, arrived)
        for expert in missing[-1:]:  # by this thread, which has nothing else to do
            self.passing[expert] = self._tiers.bring(expert, here=True)
            loadings[expert] = self.passing[expert]
        waited = {expert: loading for expert, loading in loadings.items() if expert not in ready}
        self._lease(waited, arrived)
        self.settled = False
        return self._leases

    def end_leases(self) -> None:
        """Waits for computations with the experts. Their memory may be used again then."""
        for lease in self._leases.values():
            lease.end()

    def _start(self, sources: dict[int, Source], missing: list[int]) -> dict[int, Loading]:
        """The transfers of all experts but the missing ones that are not in `missing`."""
        places = {
            "resident": self._tiers.resident,
            "predicted": self.passing,
            "host": self._tiers.host,
        }
        loadings = {e: places[source][e] for e, source in sources.items() if source in places}
        for expert in [expert for expert, source in sources.items() if source == "low_bit"]:
            self.low_bit[expert] = self._tiers.bring_low_bit(expert)
        for expert in missing:
            self.passing[expert] = self._tiers.bring(expert)
        return loadings | self.low_bit | {expert: self.passing[expert] for expert in missing}

    def _lease(self, loadings: dict[int, Loading], arrived: Callable[[int, Lease], None]) -> None:
        """Leases each expert when it is there. After an error, no expert that came is kept."""
        try:
            for expert, loading in loadings.items():
                self._leases[expert] = Lease(loading.result().matrices)
                arrived(expert, self._leases[expert])
        except BaseException:
            for loading in (*self.passing.values(), *self.low_bit.values()):
                self._tiers.leave_device(loading)
            host = self._tiers.host
            for expert in [e for e in loadings if e in host and failed(host[e])]:
                del host[expert]
            raise
