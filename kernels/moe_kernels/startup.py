"""What must happen before JAX looks for its plugins. Importing `moe_kernels` does it."""

import os
from pathlib import Path

SKIP_CHECK = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
"""JAX's own variable. Set, its CUDA plugin does not compare the versions of NVIDIA's libraries."""


def quiet_without_gpu(devices: Path = Path("/dev")) -> None:
    """Keeps JAX's CUDA plugin silent where there is no NVIDIA GPU.

    The plugin is installed on such machines to compile for GPUs that are absent. When JAX first
    looks for devices, the plugin looks for cuDNN, and JAX prints a traceback if it is missing.
    Only this check is skipped: the plugin is registered as ever, and no device is hidden. Where
    there is a GPU, or may be one, a missing library is a real fault and is still shown.
    """
    # The driver's files, and /dev/dxg under WSL2: those that JAX looks for itself, and more.
    if not any(devices.glob("nvidia*")) and not (devices / "dxg").exists():
        os.environ.setdefault(SKIP_CHECK, "1")
