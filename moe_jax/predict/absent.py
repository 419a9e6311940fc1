"""XLA's whole GPU compiler for GPUs that are absent: `compiled.as_text()` is the scheduled program.

The package jax-cuda13-pjrt of jax's own version holds the compiler. It needs no driver and no
device. XLA chooses tiles of products by rule, since it cannot time them.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.base.errors import UserError

PLUGIN = "jax_plugins.xla_cuda13"
OPTIONS: Mapping[str, Any] = {
    # The scheduler's estimate of transfers and products. It is the default, and it decides what
    # lies under what: with the other estimators half as much is covered.
    "xla_gpu_enable_analytical_sol_latency_estimator": True
}
"""Compiler options by name, so that another version's defaults change nothing."""

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""XLA's description of the card, a GpuTargetConfigProto."""


def missing() -> str:
    """Why programs cannot be compiled for absent GPUs here, and the remedy. Empty if they can."""
    try:
        found = importlib.util.find_spec(PLUGIN)
    except ModuleNotFoundError:  # not even the package around it is there
        found = None
    version = jax.__version__
    return "" if found else f"pip install --no-deps jax-cuda13-pjrt=={version} is needed"


def h100s(nodes: int, devices: int) -> list[Any]:
    """Descriptions of `nodes` machines of `devices` H100 each, node by node.

    UserError: the compiler's package is missing.
    """
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            "h100", "cuda", target_config=H100, topology=f"1x{nodes}x{devices}"
        )
    except Exception as error:
        raise UserError(f"no compiler for absent GPUs ({error}): {missing()}") from error
    return list(topology.devices)
