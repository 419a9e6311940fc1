"""Devices that a CPU stands in for."""

from contextlib import suppress

import jax

from moe_jax.base.errors import require
from moe_jax.config import ParallelConfig


def ask_for_devices(config: ParallelConfig) -> None:
    """Makes parallel.fake_devices CPU devices where that is asked for, before JAX starts.

    Each of several processes has so many.
    """
    if config.fake_devices:
        with suppress(RuntimeError):  # it runs already, perhaps with these very devices
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", config.fake_devices)


def require_devices(config: ParallelConfig) -> None:
    """UserError: JAX has started with other devices than parallel.fake_devices asks for."""
    wanted = config.fake_devices
    require(
        wanted == 0 or (jax.default_backend() == "cpu" and jax.local_device_count() == wanted),
        f"parallel.fake_devices={wanted}, and JAX runs with {jax.local_device_count()} devices of "
        f"{jax.default_backend()} already: start a new process",
    )
