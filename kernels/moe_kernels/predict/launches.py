"""From a recorded launch to its predicted time."""

import math
from typing import Any, NamedTuple

from moe_kernels.launch import Launch
from moe_kernels.predict import matrix_gradient, product
from moe_kernels.predict.device import Device, other_seconds
from moe_kernels.predict.matrix_gradient import MatrixTiles
from moe_kernels.predict.product import Product
from moe_kernels.predict.routing import Routing

PRODUCTS = (
    "up_kernel",
    "rows_kernel",
    "hidden_gradient_kernel",
    "matrix_gradient_kernel",
    "fp8_up_kernel",
    "fp8_rows_kernel",
)
"""Kernels that multiply. All others move, compare and sum."""


class LaunchTime(NamedTuple):
    """One launch, as predicted."""

    seconds: float
    """The bound, with L2 at its highest rate."""
    seconds_low_l2: float
    """The same with L2 at the lowest rate that is reported."""
    dram_bytes: float
    flops: float
    """Useful FLOPs. 0 where the launch is no product."""
    note: str
    """What ptxas reports of it. Empty where it is no product."""


class Predictor:
    """Predicts the launches of layers with one routing on one device. Equal launches are compiled
    once."""

    def __init__(self, routing: Routing, device: Device) -> None:
        self.routing = routing
        self.device = device
        self._known: dict[tuple[Any, ...], LaunchTime] = {}

    def time(self, launch: Launch) -> LaunchTime:
        """A grouped product by its tiles, everything else as fast as memory allows."""
        name = launch.kernel.__name__
        constants = launch.constants
        if name == "combine_kernel":
            tokens = launch.outputs[0].shape[0]
            rows = int(self.routing.counts.sum()) + tokens
            return self.of_memory(float(rows * constants["D"] * launch.outputs[0].dtype.itemsize))
        if name not in PRODUCTS:
            return self.of_memory(_array_bytes(launch))
        key = (name, launch.tuning, *sorted(constants.items()))
        if key not in self._known:
            self._known[key] = self._compile_and_time(launch)
        return self._known[key]

    def of_memory(self, moved: float) -> LaunchTime:
        """A launch that only moves bytes."""
        seconds = other_seconds(moved, 0, self.device)
        return LaunchTime(seconds, seconds, moved, 0.0, "")

    def _compile_and_time(self, launch: Launch) -> LaunchTime:
        # The audit imports Triton's compiler: only a prediction needs it.
        from moe_kernels.audit.compile import compile_launch

        row = compile_launch(launch, self.device.arch)
        if launch.kernel.__name__ == "matrix_gradient_kernel":
            return self._of_matrix_gradient(launch, row)
        return self._of_product(launch, row)

    def _of_product(self, launch: Launch, row: dict[str, Any]) -> LaunchTime:
        shape = describe_product(launch, row, self._resident(launch, row))
        source = self.routing.token if shape.gathered else self.routing.row
        source = source.reshape(-1, shape.bm)
        tiles = product.order(self.routing.counts, shape)
        moved = product.dram_bytes(tiles, source, shape, self.device)
        times = [
            product.launch_seconds(len(tiles), moved, shape, device) for device in self._devices()
        ]
        rows = int(self.routing.counts.sum())
        flops = 2.0 * rows * shape.depth * shape.columns * shape.halves
        return LaunchTime(times[0], times[1], moved, flops, _note(launch, row, shape))

    def _of_matrix_gradient(self, launch: Launch, row: dict[str, Any]) -> LaunchTime:
        c = launch.constants
        itemsize = launch.inputs[0].dtype.itemsize
        # Triton divides the stages among a chain of loads, so buffers are counted from their bytes.
        buffers = row["shared_bytes"] // ((c["BM"] + c["BN"]) * c["BK"] * itemsize)
        shape = Product(
            depth=0,  # each expert's own
            columns=c["N"],
            halves=1,
            bm=c["BM"],
            bn=c["BN"],
            bk=c["BK"],
            stages=max(1, buffers) if row["cp_async"] else 1,
            group=1,
            resident=self._resident(launch, row),
            special=row["special"],
            threads=32 * launch.tuning.warps,
            stored=1,
            gathered=True,
            itemsize=itemsize,
        )
        counts = self.routing.counts
        tiles = MatrixTiles(c["TILES_M"], c["TILES_N"])
        moved = matrix_gradient.dram_bytes(counts, tiles, shape, self.device)
        times = [
            matrix_gradient.launch_seconds(counts, moved, tiles, shape, device)
            for device in self._devices()
        ]
        flops = 2.0 * int(counts.sum()) * c["M"] * c["N"]
        return LaunchTime(times[0], times[1], moved, flops, _note(launch, row, shape))

    def _devices(self) -> tuple[Device, Device]:
        """The device, and the same with the lowest rate of L2."""
        return self.device, self.device._replace(l2_rate=self.device.l2_rate_low)

    def _resident(self, launch: Launch, row: dict[str, Any]) -> int:
        """Programs of a launch on a multiprocessor."""
        from moe_kernels.audit.compile import LIMITS

        warps = LIMITS[self.device.arch].warps
        found = max(1, round(row["occupancy"] * warps / launch.tuning.warps))
        return min(found, 1) if "persistent" in row["config"] else found


def describe_product(launch: Launch, row: dict[str, Any], resident: int) -> Product:
    """A launch of up, rows or the hidden gradient, in 16 bits or FP8, for product.py."""
    c = launch.constants
    name = launch.kernel.__name__
    up = "up" in name
    hidden_gradient = name == "hidden_gradient_kernel"
    fp8 = name.startswith("fp8")
    stored = 1
    if up and c["SAVE"]:
        stored = 3  # z is two numbers for one of the hidden activation
    if hidden_gradient:
        stored = 3  # dz is two numbers, and s A is one
    if name == "fp8_rows_kernel":
        stored = 2  # numbers of 16 bits, counted in bytes
    return Product(
        depth=c["D"] if up or hidden_gradient else c["KD"],
        columns=c["F"] if up or hidden_gradient else c["N"],
        halves=2 if up else 1,
        bm=c["BM"],
        bn=c["BN"],
        bk=c["BK"],
        # Without cp.async in the machine code nothing is in flight, whatever was asked for.
        stages=launch.tuning.stages if row["cp_async"] else 1,
        group=c["GROUP"],
        resident=resident,
        special=row["special"],
        threads=32 * launch.tuning.warps,
        stored=stored,
        gathered=up or hidden_gradient or c.get("GATHER", False),
        loaded=2 if hidden_gradient else 0,  # z
        itemsize=1 if fp8 else launch.inputs[0].dtype.itemsize,
        rate=2.0 if fp8 else 1.0,
        promoted=fp8,
    )


def _array_bytes(launch: Launch) -> float:
    arrays = (*launch.inputs, *launch.outputs)
    return float(sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays))


def _note(launch: Launch, row: dict[str, Any], shape: Product) -> str:
    kernel = launch.kernel.__name__.removesuffix("_kernel")
    note = f"{kernel} {row['registers']} registers, {shape.resident} resident"
    note += f", {row['cp_async']} cp.async, {row['special']} special"
    return note + (f", {row['spill_bytes']} bytes SPILLED" if row["spill_bytes"] else "")
