"""Every kernel once, for programs that watch: python -m moe_kernels.first_gpu.small.

    python -m moe_kernels.first_gpu.small [--shape NAME] [--launch NAME ...]

Without a name all launches of a training step, decoding and, where the device has FP8, the FP8
layer run once, on a small layer of odd sizes. A tool that slows a program hundreds of times is
through in a minute then. With names those launches run on the sizes of a model.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moe_kernels import experts_fp8
from moe_kernels.bench.launches import LAUNCHES, Work, all_work
from moe_kernels.bench.peers import default_peers
from moe_kernels.bench.shapes import SHAPES, Shape, make_inputs
from moe_kernels.experts import mixture
from moe_kernels.launch import fp8_support, interpreting

SMALL = Shape(37, 72, 40, 5, 2)
"""No size is a multiple of a tile, so that every mask is at work."""


def main(argv: Sequence[str]) -> int:
    """Runs them, each waited for, with its name before it."""
    parser = argparse.ArgumentParser(description="Every kernel once.")
    parser.add_argument("--shape", choices=list(SHAPES), help="a model's sizes")
    parser.add_argument("--launch", nargs="+", choices=LAUNCHES, help="these alone")
    options = parser.parse_args(argv)
    shape = SHAPES[options.shape] if options.shape else SMALL
    work = all_work(shape, "bfloat16", default_peers())
    if options.launch:
        work = {name: work[name] for name in options.launch}
    else:
        work |= whole_layers(shape)
    for name, launch in work.items():
        print(name, flush=True)
        jax.block_until_ready(jax.jit(launch.function)(*launch.arrays))
    return 0


def whole_layers(shape: Shape) -> dict[str, Work]:
    """Decoding, and the FP8 layer where it can run, with the kernels that only they launch."""
    make_plan = default_peers().make_plan
    layers: dict[str, tuple[Callable[..., Any], Shape]] = {
        "decoding": (mixture, shape._replace(tokens=1, per_token=2))
    }
    # The interpreter's FP8 is the tests' business, and slow.
    if fp8_support().name != "none" and not interpreting():
        layers["FP8"] = (experts_fp8.mixture, shape)
    work = {}
    for name, (layer, sizes) in layers.items():
        inputs = make_inputs(sizes, jnp.dtype("bfloat16").name)
        plan = make_plan(inputs.experts, sizes.experts)
        work[name] = Work(partial(layer, plan=plan), inputs[:4], 0.0, 0.0)
    return work


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
