"""XLA's whole GPU compiler for GPUs that are absent: `compiled.as_text()` is the scheduled program.

The package jax-cuda13-pjrt of jax's own version holds the compiler, and so does jax-cuda12-pjrt. It
needs no driver and no device. XLA chooses tiles of products by rule, since it cannot time them.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.base.errors import UserError, brief, require
from moe_jax.predict.hardware import Card

PLUGINS = ("xla_cuda13", "xla_cuda12")
"""Packages below jax_plugins. Each holds the compiler, whatever CUDA it is for."""
TRIAL = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
found = topologies.get_topology_desc("card", "cuda", target_config=sys.argv[1], topology="1x1x1")
one = NamedSharding(Mesh(found.devices, "x"), PartitionSpec())
x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=one)
jax.jit(lambda x: jax.nn.softmax(x @ x)).lower(x).compile()
"""
"""The smallest program with a product and a fusion of Triton's."""
OPTIONS: Mapping[str, Any] = {
    # The scheduler's estimate of transfers and products. It is the default, and it decides what
    # lies under what: with the other estimators half as much is covered.
    "xla_gpu_enable_analytical_sol_latency_estimator": True
}
"""Compiler options by name, so that another version's defaults change nothing."""


def missing() -> str:
    """Why programs cannot be compiled for absent GPUs here, and the remedy. Empty if they can."""
    around = importlib.util.find_spec("jax_plugins") is not None
    if around and any(importlib.util.find_spec(f"jax_plugins.{name}") for name in PLUGINS):
        return ""
    version = jax.__version__
    return f"run pip install --no-deps jax-cuda13-pjrt=={version} (Linux only)"


def absent_devices(card: Card, devices: int) -> list[Any]:
    """Descriptions of so many of these cards, node by node. They have a compiler and no memory.

    UserError: the compiler's package is missing, or `devices` is more than a node and not a
    multiple of it.
    """
    from jax.experimental import topologies

    inside = min(devices, card.node)
    require(
        devices % inside == 0,
        f"--devices {devices} does not divide into nodes of {card.node} {card.name}: make it "
        f"{-(-devices // inside) * inside}",
    )
    try:
        topology = topologies.get_topology_desc(
            card.name,
            "cuda",
            target_config=card.target,
            topology=f"1x{devices // inside}x{inside}",
        )
    except Exception as error:
        raise UserError(f"no compiler for absent GPUs ({brief(error)}): {missing()}") from error
    return list(topology.devices)


def check_target(card: Card) -> None:
    """UserError: XLA cannot compile for this card. A process of its own tries it.

    A description with a wrong number may end XLA's process, which no exception handler sees.
    """
    command = [sys.executable, "-c", TRIAL, card.target]
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        command, env=kept | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    if done.returncode == 0:
        return
    reason = f"it ended with signal {-done.returncode}" if done.returncode < 0 else "it failed"
    lines = done.stderr.strip().splitlines() or ["no message"]
    own = ", ".join(f"{name} = {value}" for name, value in card.xla.items())
    raise UserError(
        f"XLA cannot compile for {card.name}: {reason} ({brief(lines[-1])}); compare its fields "
        f"with those of a card that is known: {own}"
    )
