"""How far published kernels stay below the model's bound on an H100: the calibration band.

SonicMoE (arXiv:2512.14080) publishes its own TFLOP/s and those of ScatterMoE on a grid of layers.
The model is run on the same layers, with the kernels of this repository. A ratio is published over
model. ScatterMoE is Triton without SonicMoE's fusions, and SonicMoE is CuTe DSL with TMA and
warp specialisation. The kernels here are Triton with most of SonicMoE's fusions, so their rate is
expected between both.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moe_kernels.bench.shapes import SONIC, Shape
from moe_kernels.predict import Device, Predictor, balanced_routing, launch_name, train_launches
from moe_kernels.predict.device import VERSION
from moe_kernels.predict.layers import BACKWARD

from experiments.kernel_ladder.ranges import Range, covering

Kind = Literal["forward", "backward"]
KINDS: tuple[Kind, Kind] = ("forward", "backward")

PUBLISHED: Mapping[str, Mapping[Kind, Mapping[str, tuple[float, ...]]]] = {
    "SonicMoE": {
        "forward": {"7B": (367, 435, 467), "30B": (430, 503, 553), "120B": (520, 560, 597)},
        "backward": {"7B": (406, 440, 468), "30B": (460, 512, 556), "120B": (527, 568, 587)},
    },
    "ScatterMoE": {
        "forward": {"7B": (207, 235, 265), "30B": (262, 323, 368), "120B": (336, 381, 386)},
        "backward": {"7B": (212, 248, 280), "30B": (237, 303, 340), "120B": (316, 353, 369)},
    },
}
"""TFLOP/s on an H100 in bfloat16, with the hidden width F growing: 256, 512 and 1024 for 7B and
30B, 512, 1024 and 2048 for 120B. Useful FLOPs: 6 T K D F forward, 12 T K D F backward."""


@dataclass(frozen=True)
class Point:
    """One published rate beside the model's."""

    shape: str
    """Its name in moe_kernels.bench.shapes."""
    kind: Kind
    kernel: str
    published_tflops: float
    model_tflops: float
    """The bound, with this repository's kernels."""
    ratio: float
    """Published over model."""


def published_rates(kernel: str, kind: Kind) -> dict[str, float]:
    """TFLOP/s of a published kernel by the shape's name."""
    names = iter(SONIC)
    found = {}
    for size in ("1.4B", "7B", "30B", "120B"):
        for index in range(3):
            name = next(names)
            if size in PUBLISHED[kernel][kind]:
                found[name] = PUBLISHED[kernel][kind][size][index]
    return found


def model_tflops(shape: Shape, device: Device, seed: int) -> dict[Kind, float]:
    """The bound's rate on one layer. The forward pass keeps z, as it does in training."""
    predictor = Predictor(balanced_routing(shape, seed), device)
    seconds = {"forward": 0.0, "backward": 0.0}
    for launch in train_launches(shape, device.arch):
        kind = "backward" if launch_name(launch) in BACKWARD else "forward"
        seconds[kind] += predictor.time(launch).seconds
    return {
        "forward": shape.flops / seconds["forward"] / 1e12,
        "backward": 2 * shape.flops / seconds["backward"] / 1e12,
    }


def calibrate(device: Device, seed: int) -> list[Point]:
    """Every published point beside the model's."""
    points = []
    for name in published_rates("SonicMoE", "forward"):
        model = model_tflops(SONIC[name], device, seed)
        print(f"calibration: {name}", flush=True)
        for kernel in PUBLISHED:
            for kind in KINDS:
                rate = published_rates(kernel, kind)[name]
                points.append(Point(name, kind, kernel, rate, model[kind], rate / model[kind]))
    return points


@dataclass(frozen=True)
class Band:
    """Published over model, from the lowest to the highest."""

    forward: Range
    backward: Range


def band_of(points: list[Point]) -> Band:
    """The least band that holds every point."""
    return Band(*(covering(p.ratio for p in points if p.kind == kind) for kind in KINDS))


def to_json(points: list[Point], device: Device) -> dict[str, Any]:
    """The table and its band."""
    return {
        "model": VERSION,
        "device": device.name,
        "source": "published: arXiv:2512.14080; model: the bound with the kernels' tiles of today",
        "band": {kind: list(getattr(band_of(points), kind)) for kind in KINDS},
        "points": [asdict(point) for point in points],
    }


def points_from_json(content: Mapping[str, Any]) -> list[Point]:
    """The points of a recorded table."""
    return [Point(**point) for point in content["points"]]
