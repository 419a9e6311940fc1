"""How Triton kernels can run on this machine: through jax-triton, interpreted, or not at all."""

import importlib.util
import os
from typing import NamedTuple

import jax


class Route(NamedTuple):
    """A way to run kernels, and why it is this one."""

    name: str
    """`gpu`, `interpreter` or `none`."""
    reason: str


def triton_route() -> Route:
    """Finds the way without importing Triton (it exists for Linux only, and its import is slow).

    `gpu` needs an NVIDIA device of compute capability 8.0 or more; `interpreter` (kernels run by
    NumPy, for tests) needs TRITON_INTERPRET=1 before the first kernel is imported.
    """
    if importlib.util.find_spec("triton") is None:
        return Route("none", "the package triton is not installed (it has wheels for Linux only)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Route("interpreter", "TRITON_INTERPRET=1")
    if jax.default_backend() != "gpu":
        return Route("none", f"the devices are {jax.default_backend()}, not NVIDIA GPUs")
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability is None or float(capability) < 8.0:
        return Route("none", f"{device.device_kind} has compute capability {capability}, below 8.0")
    return Route("gpu", f"{device.device_kind}, compute capability {capability}")
