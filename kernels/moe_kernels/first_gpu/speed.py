"""Times: every launch by itself, layers beside their peers, memory, tiles, decoding."""

from collections.abc import Sequence
from typing import Any

from moe_kernels.bench.launches import LAUNCHES
from moe_kernels.bench.measure import (
    DECODING,
    GEMM,
    measure_decoding,
    measure_launches,
    measure_layers,
)
from moe_kernels.bench.memory import measure_memory
from moe_kernels.bench.peers import RAGGED, Peers, default_peers, load_peers
from moe_kernels.bench.shapes import SHAPES, Shape
from moe_kernels.bench.tune import PICKED, tune
from moe_kernels.experts.shapes import Tiles
from moe_kernels.first_gpu.context import Context, Measurement, Outcome

MODEL = "OLMoE-1B-7B"
THREE = (MODEL, "Qwen3-30B-A3B", "sonic 7B n=512")
LARGE = "DeepSeek-V3"
DRY = Shape(6, 16, 8, 2, 1)
"""Sizes of every layer of a dry run."""
DRY_GEMM = 32
ROUNDS = 7
TUNING_ROUNDS = 3


class Sizes:
    """What to measure, in full or in the interpreter."""

    def __init__(self, context: Context) -> None:
        self.settings = context.settings
        self.dry = self.settings.dry_run
        self.rounds = 1 if self.dry else ROUNDS
        self.gemm = DRY_GEMM if self.dry else GEMM
        self.dtype = "float32" if self.dry else "bfloat16"

    @property
    def peers(self) -> Peers:
        """All layers, by one plan. Raises ValueError where another package's cannot be imported."""
        return load_peers(self.settings.layers, self.settings.plan)

    def shape(self, name: str) -> Shape:
        """A layer's sizes by its name."""
        return DRY if self.dry else SHAPES[name]

    def candidates(self, operation: str) -> list[Tiles]:
        """Tiles beside the table's own."""
        return [] if self.dry else PICKED[operation]

    def without_ragged(self) -> Peers:
        """The peers without those that compute every expert, or may take minutes to compile."""
        peers = self.peers
        layers = {name: layer for name, layer in peers.layers.items() if name not in RAGGED}
        return peers._replace(layers=layers)


def launches(context: Context) -> Outcome:
    """Every launch of a training step on one model."""
    return launches_of(context, MODEL)


def large_launches(context: Context) -> Outcome:
    """The same on DeepSeek-V3's sizes."""
    return launches_of(context, LARGE)


def launches_of(context: Context, name: str) -> Outcome:
    """Reports seconds and rates of each launch."""
    sizes = Sizes(context)
    options = {"rounds": sizes.rounds, "size": sizes.gemm}
    # By the kernels' own plan: no launch needs another package.
    row = measure_launches(name, sizes.shape(name), sizes.dtype, default_peers(), **options)
    for launch, entry in row["calls"].items():
        seconds = 1e-6 * entry.pop("microseconds")
        context.report(_measurement(name, launch, seconds, launch=launch, **entry))
    missing = [launch for launch in LAUNCHES if launch not in row["calls"]]
    return Outcome(not missing, f"failed: {', '.join(missing)}" if missing else "")


def layers(context: Context) -> Outcome:
    """Three layers beside their peers. ragged_dot compiles for long: one model, forward only."""
    missing: list[str] = []
    sizes = Sizes(context)
    # The sizes of a dry run are the same for all names.
    for name in THREE[:1] if sizes.dry else THREE:
        if context.left() < 0:
            missing.append(name)
            continue
        peers = sizes.peers if name == MODEL else sizes.without_ragged()
        missing += layers_of(context, name, peers, forward_only=("ragged_dot",))
    return _without(missing)


def large_layers(context: Context) -> Outcome:
    """DeepSeek-V3's layer."""
    return _without(layers_of(context, LARGE, Sizes(context).without_ragged()))


def layers_of(
    context: Context, name: str, peers: Peers, forward_only: Sequence[str] = ()
) -> list[str]:
    """Reports seconds, rates and bytes of each layer and of the single products.

    Returns the layers that did not run. A peer may be too large for the device.
    """
    sizes = Sizes(context)
    options = {"rounds": sizes.rounds, "size": sizes.gemm, "forward_only": forward_only}
    row = measure_layers(name, sizes.shape(name), sizes.dtype, peers, **options)
    for call, entry in row["calls"].items():
        seconds = 1e-3 * entry.pop("milliseconds")
        implementation, _, kind = call.rpartition(" ")
        where = {"kind": kind, "implementation": implementation}
        context.report(_measurement(name, call, seconds, **where, **entry))
    wanted = {
        f"{layer} {kind}"
        for layer in peers.layers
        for kind in ("forward", "train")
        if kind == "forward" or layer not in forward_only
    }
    return [f"{name} {call}" for call in sorted(wanted - row["calls"].keys())]


def _without(missing: list[str]) -> Outcome:
    """Not ok where something of our own is missing. Without a peer it is, and says so."""
    own = any(call in THREE or " triton " in call for call in missing)
    return Outcome(not own, f"without {', '.join(missing)}" if missing else "")


def memory(context: Context) -> Outcome:
    """Bytes that layers keep for the backward pass, against the formula."""
    sizes = Sizes(context)
    row = measure_memory(sizes.shape(MODEL), sizes.dtype, sizes.without_ragged())
    for name, entry in row.items():
        ratio = entry["kept"] / entry["formula"]
        measurement = _measurement(MODEL, f"{name} kept", entry["kept"], "bytes", ratio=ratio)
        context.report({**measurement, **entry})
    return Outcome("triton" in row, "" if "triton" in row else "the kernels did not run")


def tiles(context: Context) -> Outcome:
    """A few neighbours of the table's tiles, one operation after the other."""
    sizes = Sizes(context)
    tuned = {}
    for operation in PICKED:
        if context.left() < 0:
            break
        options = {
            "rounds": TUNING_ROUNDS,
            "candidates": sizes.candidates,
            "operations": [operation],
        }
        row = tune(MODEL, sizes.shape(MODEL), sizes.dtype, default_peers(), **options)
        tuned |= row["tuned_ms"]
        own = row["tuned_ms"][operation]["table"]
        best = min(row["tuned_ms"][operation]["fastest"].values(), default=None)
        if own and best:
            call = f"{operation} table over fastest"
            context.report(_measurement(MODEL, call, own / best, "x"))
    left_out = [o for o in PICKED if not tuned.get(o, {}).get("fastest")]
    reason = f"left out: {', '.join(left_out)}" if left_out else ""
    return Outcome(len(left_out) < len(PICKED), reason, {"tuned_ms": tuned})


def decoding(context: Context) -> Outcome:
    """Few tokens on the smallest and the largest model."""
    sizes = Sizes(context)
    missing: list[str] = []
    for name in (MODEL, LARGE):
        if context.left() < 0:
            missing.append(name)
            continue
        row = measure_decoding(
            name,
            sizes.shape(name),
            sizes.dtype,
            sizes.peers,
            rounds=sizes.rounds,
            tokens=DECODING[:1] if sizes.dry else DECODING,
        )
        for call, entry in row["decoding"].items():
            seconds = 1e-6 * entry.pop("microseconds")
            context.report(_measurement(name, call, seconds, **entry))
        if not any(call.startswith("triton") for call in row["decoding"]):
            missing.append(f"{name} triton forward")
    return _without(missing)


def _measurement(
    shape: str, call: str, value: float, unit: str = "s", **fields: Any
) -> Measurement:
    return {"name": f"{shape} {call}", "value": value, "unit": unit, "shape": shape, **fields}
