"""Devices that a CPU stands in for."""

import jax

from moe_jax.base.errors import require
from moe_jax.config import ParallelConfig


def start_devices(config: ParallelConfig) -> None:
    """Makes parallel.fake_devices CPU devices where that is asked for, before JAX starts.

    UserError: JAX has started with other devices.
    """
    wanted = config.fake_devices
    if not wanted:
        return
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:
        pass  # it runs already, perhaps with these very devices
    require(
        jax.default_backend() == "cpu" and jax.local_device_count() == wanted,
        f"parallel.fake_devices={wanted}, and JAX runs with {jax.local_device_count()} devices of "
        f"{jax.default_backend()} already: start a new process",
    )
