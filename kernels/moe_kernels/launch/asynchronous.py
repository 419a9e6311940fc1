"""Gluon kernels with TMA and specialised warps: whether they can run here, and how JAX calls them.

jax-triton 0.4.1 takes Gluon kernels and TMA descriptors, and two things break these:

- It launches `num_warps`, which are the warps of the first partition alone. The PTX asks for those
  of all partitions (`.reqntid`), and CUDA refuses a launch of others.
- It compiles Gluon by Triton's passes and not by Gluon's. They give descriptors other layouts than
  the kernel's, which for the gather does not compile.

So this module compiles with `triton.compile`, as the audit does, and hands the PTX to the launcher
in jaxlib that jax-triton hands its own to.
"""

import importlib.metadata
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax import Array, ShapeDtypeStruct

from moe_kernels.launch.assembler import choose_assembler
from moe_kernels.launch.support import Support, UnavailableError, capability, triton_support

ASYNC_CAPABILITIES = (90, 100)
"""H100 and B200. They have TMA, and matrix units that read shared memory. 12.0 has TMA alone."""
TRITON = (3, 9)
"""The least version. Gluon is experimental, and its names change from version to version."""
TARGET = "triton_kernel_call_ffi"
"""jaxlib's name of its launcher of Triton kernels."""
SWIZZLE = 128
"""Bytes of a box's row within which shared memory swaps pieces, so that banks do not collide."""
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "int32": "i32"}
"""Triton's names of the dtypes that these kernels have."""

Boxes = Mapping[int, tuple[int, ...]]
"""Sizes of the boxes in which TMA reads an input, by the input's number."""


def async_support() -> Support:
    """triton_support for Gluon kernels with TMA and specialised warps.

    `interpreter` is this package's own (launch.gluon_interpreter). Triton has none for Gluon.
    """
    support = triton_support()
    if support.name not in ("gpu", "lower"):
        return support
    if capability() not in ASYNC_CAPABILITIES:
        return Support("none", f"compute capability {capability() / 10} is neither 9.0 nor 10.0")
    problem = _old_triton() or _old_jaxlib()
    return Support("none", problem) if problem else support


def require_async() -> None:
    """Raises UnavailableError, with the reason and the alternatives, where they cannot run."""
    support = async_support()
    if support.name == "none":
        raise UnavailableError(
            f"asynchronous kernels cannot run: {support.reason}; use implementation 'triton'"
        )


def _old_triton() -> str:
    found = importlib.metadata.version("triton")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) >= TRITON:
        return ""
    return f"triton is {found}, and their Gluon needs {TRITON[0]}.{TRITON[1]} or newer"


def _old_jaxlib() -> str:
    if hasattr(_launcher(), "create_tma_descriptor_parameter"):
        return ""
    found = importlib.metadata.version("jaxlib")
    return f"jaxlib {found} passes no TMA descriptors to kernels (0.11.2 does, with Python 3.12)"


def _launcher() -> Any:
    """jaxlib's side of Triton kernels. jax-triton takes it from the same place."""
    from jax._src.lib import gpu_triton  # pyright: ignore[reportPrivateImportUsage]

    return gpu_triton


def compile_gluon(
    kernel: Any,
    arrays: Sequence[Any],
    boxes: Boxes,
    warps: int,
    constants: Mapping[str, Any],
    arch: int,
) -> Any:
    """triton.compile's result for a Gluon kernel of arrays (inputs, then outputs) and constants."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton asks for a choice
    if os.environ.get("TRITON_CACHE_DIR") == "":  # jax-triton 0.3.1 empties it
        del os.environ["TRITON_CACHE_DIR"]
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    for i, array in enumerate(arrays):
        dtype = DTYPES[array.dtype.name]
        signature[names[i]] = _descriptor_type(boxes[i], dtype) if i in boxes else f"*{dtype}"
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays)) if i not in boxes}
    numbered = {(names.index(key),): value for key, value in constants.items()}
    source = GluonASTSource(kernel, signature, numbered, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})


def _descriptor_type(box: Sequence[int], dtype: str) -> str:
    from triton.experimental.gluon.language import NVMMASharedLayout

    layout = NVMMASharedLayout(SWIZZLE, element_bitwidth=16, rank=len(box))
    return f"tensordesc<{dtype}[{','.join(map(str, box))}],{layout!r}>"


def call_gluon(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[ShapeDtypeStruct],
    grid: Sequence[int],
    warps: int,
    *,
    boxes: Boxes,
    constants: Mapping[str, Any],
) -> list[Array]:
    """The kernel as a call in the JAX program that is being traced."""
    choose_assembler()
    arch = capability()
    compiled = compile_gluon(kernel, (*inputs, *outputs), boxes, warps, constants, arch)
    metadata = compiled.metadata
    launcher = _launcher()
    descriptions = iter(metadata.tensordesc_meta)
    parameters = []
    for i, array in enumerate((*inputs, *outputs)):
        if i in boxes:
            parameters += _descriptor(array, next(descriptions))
        else:
            parameters.append(launcher.create_array_parameter(0, 16))  # not zeroed, 16-byte aligned
    program = launcher.TritonKernel(
        kernel_name=metadata.name,
        num_warps=metadata.num_warps,  # of all partitions
        num_ctas=1,
        shared_mem_bytes=metadata.shared,
        ptx=compiled.asm["ptx"],
        ttir="",
        compute_capability=arch,
    )
    call = launcher.TritonKernelCall(program, *grid, *(1,) * (3 - len(grid)), parameters)
    opaque = zlib.compress(call.to_proto(metadata.name, b""))
    return list(jax.ffi.ffi_call(TARGET, list(outputs))(*inputs, opaque=opaque))


def _descriptor(array: Array | ShapeDtypeStruct, description: Mapping[str, Any]) -> Iterator[Any]:
    """The parameters that a descriptor becomes: itself, then its sizes and its strides."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    launcher = _launcher()
    strides = [1]
    for size in reversed(array.shape[1:]):
        strides.insert(0, strides[0] * size)
    yield launcher.create_tma_descriptor_parameter(
        elem_type=TMA_DTYPE_DEVICE_TO_HOST[description["elem_type"]],
        swizzle=description["swizzle"],
        shape=array.shape,
        strides=strides,
        block_shape=description["block_size"],
        oob_fill=0,  # zeros past the end
    )
    for size in array.shape:
        yield launcher.create_scalar_parameter(size, "i32")
    for stride in strides:
        yield launcher.create_scalar_parameter(stride, "i64")
