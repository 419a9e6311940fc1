"""Gluon kernels with TMA and specialised warps: whether they can run here, and how JAX calls them."""

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from moe_kernels.launch.support import (
    Support,
    UnavailableError,
    capability,
    triton_support,
)

ASYNC_CAPABILITIES = (90, 100)
"""H100 and B200. They have TMA and matrix units that read shared memory. 12.0 has only TMA."""
NEEDED = {"triton": (3, 9), "jax-triton": (0, 4, 1)}
"""Packages and their least versions: the Gluon that the kernels are written in, and TMA descriptors
among a kernel's arguments. jax-triton 0.4.1 needs Python 3.12 and jax 0.11."""
SWIZZLE = 128
"""Bytes of a row of a box that shared memory interleaves, so that its banks do not collide."""

Boxes = Mapping[int, tuple[int, ...]]
"""Sizes of the boxes in which TMA reads an input, by the input's index."""


def async_support() -> Support:
    """triton_support for Gluon kernels with TMA and specialised warps.

    `interpreter` is this package's own, because Triton has none for Gluon.
    """
    support = triton_support()
    if support.name not in ("gpu", "lower"):
        return support
    if capability() not in ASYNC_CAPABILITIES:
        return Support("none", f"compute capability {capability() / 10} is neither 9.0 nor 10.0")
    problem = _old_package() or _old_jaxlib()
    return Support("none", problem) if problem else support


def require_async() -> None:
    """Raises UnavailableError, with the reason and the alternatives, where they cannot run."""
    support = async_support()
    if support.name == "none":
        raise UnavailableError(
            f"asynchronous kernels cannot run: {support.reason}; use implementation 'triton'"
        )


def _old_package() -> str:
    """Which package is older than the kernels need; empty if none is."""
    for package, least in NEEDED.items():
        found = importlib.metadata.version(package)
        if tuple(int(part) for part in re.findall(r"\d+", found)[: len(least)]) < least:
            needed = ".".join(map(str, least))
            python = ", which needs Python 3.12" if package == "jax-triton" else ""
            return f"{package} is {found}, and they need {needed}{python}"
    return ""


def _old_jaxlib() -> str:
    """Whether jaxlib cannot give a kernel a TMA descriptor; empty if it can."""
    from jax._src.lib import gpu_triton

    if hasattr(gpu_triton, "create_tma_descriptor_parameter"):
        return ""
    return f"jaxlib {importlib.metadata.version('jaxlib')} has no TMA descriptors (0.11.2 has)"


def box_type(box: Sequence[int], dtype: str) -> str:
    """The type of a TMA descriptor among a kernel's arguments. `dtype` is Triton's name."""
    return f"tensordesc<{dtype}[{','.join(map(str, box))}],{box_layout(box)!r}>"


def box_layout(box: Sequence[int]) -> Any:
    """How a box of 16-bit numbers lies in shared memory."""
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(SWIZZLE, element_bitwidth=16, rank=len(box))


def with_descriptors(inputs: Sequence[Array], boxes: Boxes) -> list[Any]:
    """The inputs, with a TMA descriptor in place of each that is read in boxes."""
    import jax_triton

    launch_every_warp()
    return [
        jax_triton.TensorDescriptor.from_array(array, boxes[i], box_layout(boxes[i]))
        if i in boxes
        else array
        for i, array in enumerate(inputs)
    ]


class _EveryWarp:
    """jaxlib's Triton library, for which a kernel has as many warps as its PTX says.

    jax-triton 0.4.1 launches `num_warps`, which are the warps of a Gluon kernel's first partition
    alone. The driver refuses such a launch, because the PTX asks for the warps of all partitions.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def TritonKernel(self, name: str, warps: int, ctas: int, shared: int, ptx: str, *rest: Any) -> Any:  # noqa: E501, N802
        threads = re.search(r"\.reqntid (\d+)", ptx)
        warps = int(threads[1]) // 32 if threads else warps
        return self._library.TritonKernel(name, warps, ctas, shared, ptx, *rest)


def launch_every_warp() -> None:
    """Puts _EveryWarp in the place where jax-triton looks the library up, once."""
    from jax_triton import triton_lib

    library = triton_lib.triton_kernel_call_lib
    if not isinstance(library, _EveryWarp):
        triton_lib.triton_kernel_call_lib = _EveryWarp(library)
