"""What XLA makes of a layer for an H100 that is not there: FLOPs, launches and bytes, counted.

The package jax-cuda13-pjrt holds XLA's whole GPU compiler and needs neither a GPU nor a driver. It
compiles for a description of the device, and the scheduled program is read as text. The counts of
the ladder's shapes are recorded in results/compiled_h100.json. The ladder counts again where the
package is installed, and reads the recorded counts where it is not.

Without the GPU XLA cannot time its candidates, so the tiles of its products are not those of a real
run. FLOPs, launches and temporary arrays do not depend on them.
"""

import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from moe_kernels.bench.peers import ragged
from moe_kernels.bench.shapes import Shape
from moe_kernels.launch import lowering_for

from experiments.kernel_ladder.cases import layer_arrays, plan_shape
from experiments.kernel_ladder.program_text import Counted, count_text
from moe_jax.moe import xla

RECORDED = Path(__file__).parent / "results/compiled_h100.json"
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""An H100 as XLA describes it (stream_executor.GpuTargetConfigProto in text form)."""

COMPILER = "jax-cuda13-pjrt"
"""The package with XLA's GPU compiler."""

LAYERS: Mapping[str, Callable[..., Any]] = {"xla": xla.mixture, "ragged_dot": ragged}


Counts = dict[str, dict[str, dict[str, Counted]]]
"""By shape, then layer (`xla`, `ragged_dot`), then `forward` or `train`."""


def can_compile() -> bool:
    """Whether XLA's GPU compiler is installed."""
    try:
        importlib.metadata.distribution(COMPILER)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def count(shape: Shape, layer: str, kind: str) -> Counted:
    """Compiles a layer's forward pass, or forward and backward (`train`), and counts."""
    topology = topologies.get_topology_desc("h100", "cuda", target_config=TARGET, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def train(*inputs: Any) -> Any:
        *arrays, plan = inputs
        out, pull = jax.vjp(partial(LAYERS[layer], plan=plan), *arrays)
        return out, pull(out)  # any cotangent of out's shape will do

    def forward(*inputs: Any) -> Any:
        return LAYERS[layer](*inputs)

    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        (*layer_arrays(shape), plan_shape(shape)),
    )
    with lowering_for(90):
        function = train if kind == "train" else forward
        compiled = jax.jit(function).lower(*arguments).compile()
    memory: Any = compiled.memory_analysis()
    return count_text(compiled.as_text() or "", memory.temp_size_in_bytes)


def count_all(shapes: Mapping[str, Shape]) -> Counts:
    """Every program of every shape, compiled here."""
    # JAX's own level shows warnings: that XLA knows no sort of the absent device, and that
    # ragged_dot does not fit. The compiler reads the level when it is loaded.
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    return {
        name: {
            layer: {kind: count(shape, layer, kind) for kind in ("forward", "train")}
            for layer in LAYERS
        }
        for name, shape in shapes.items()
    }


def read_recorded() -> Counts:
    """The recorded counts."""
    content = json.loads(RECORDED.read_text())["shapes"]
    return {
        shape: {
            layer: {kind: _from_json(fields) for kind, fields in kinds.items()}
            for layer, kinds in layers.items()
        }
        for shape, layers in content.items()
    }


def _from_json(fields: dict[str, Any]) -> Counted:
    return Counted(
        flops=fields["flops"],
        kernels=fields["kernels"],
        turn_flops=tuple(fields["turn_flops"]),
        turn_kernels=tuple(fields["turn_kernels"]),
        temporary_bytes=fields["temporary_bytes"],
    )


def to_json(counts: Counts) -> dict[str, Any]:
    """The counts with how they were obtained."""
    packages = ("jax", "jaxlib", COMPILER)
    return {
        "how": "XLA's GPU compiler (jax-cuda13-pjrt) for the description of an H100, without a "
        "GPU; FLOPs and launches are counted in the text of the scheduled program",
        "target": " ".join(TARGET.split()),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "shapes": {
            shape: {
                layer: {kind: asdict(counted) for kind, counted in kinds.items()}
                for layer, kinds in layers.items()
            }
            for shape, layers in counts.items()
        },
    }
