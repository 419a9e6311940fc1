"""A launch compiled for an architecture without its GPU, and what ptxas, PTX and SASS say of it."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from moe_kernels.audit.describe import DTYPE_NAMES, describe
from moe_kernels.launch import Launch, compile_gluon

REGISTERS = 65536
"""Registers of a multiprocessor, on every architecture here."""


class Limits(NamedTuple):
    """What a multiprocessor of an architecture has."""

    warps: int
    """Warps that it can hold."""
    shared: int
    """KiB of shared memory. A program may have 1 KiB less."""


# CUDA C++ Programming Guide, "Technical specifications per compute capability".
LIMITS = {
    80: Limits(64, 164),
    86: Limits(48, 100),
    89: Limits(48, 100),
    90: Limits(64, 228),
    100: Limits(64, 228),
    120: Limits(48, 100),
}
"""By compute capability times ten."""


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one program may have."""
    return (LIMITS[arch].shared - 1) * 1024


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """A row of the table. `arch` is the compute capability times ten."""
    compiled = _compile_gluon(launch, arch) if launch.boxes else _compile(launch, arch)
    kernel, _, config = describe(launch).partition(" ")
    return {"kernel": kernel, "config": config, "arch": arch} | _measure(compiled, arch)


def _compile_gluon(launch: Launch, arch: int) -> Any:
    arrays = (*launch.inputs, *launch.outputs)
    warps = launch.tuning.warps
    return compile_gluon(launch.kernel, arrays, launch.boxes, warps, launch.constants, arch)


def _compile(launch: Launch, arch: int) -> Any:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton asks for a choice
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arrays = (*launch.inputs, *launch.outputs)
    names = launch.kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    # The arrays come first among a kernel's arguments; the rest are its constants.
    signature |= {n: f"*{DTYPE_NAMES[a.dtype.name]}" for n, a in zip(names, arrays, strict=False)}
    # jax-triton promises 16-byte pointers as well, and without it no access would be wide.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    constants = {(names.index(key),): value for key, value in launch.constants.items()}
    source = ASTSource(launch.kernel, signature, constants, aligned)
    options = {"num_warps": launch.tuning.warps, "num_stages": launch.tuning.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _measure(compiled: Any, arch: int) -> dict[str, int | float]:
    """Counts from ptxas's report, the PTX and the SASS."""
    ptx = compiled.asm["ptx"]
    shared = compiled.metadata.shared
    report, sass = _assemble(ptx, arch)
    registers = int(next(iter(re.findall(r"Used (\d+) registers", report)), 0))
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]  # stores, then loads
    return {
        "registers": registers,
        "spill_bytes": sum(spills),
        "shared_bytes": shared,
        "cp_async": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "mbarrier": len(re.findall(r"\bmbarrier\.", ptx)),
        "setmaxnreg": len(re.findall(r"\bsetmaxnreg\.", ptx)),
        # The matrix units' instruction is another on each of sm_90, sm_80 and sm_100.
        "mma": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
        "fp8_mma": len(re.findall(r"mma\S*(?:\.e4m3\.e4m3|::f8f6f4)", ptx)),
        # 128 bits are 16 bytes a thread, the widest access.
        "wide_accesses": len(re.findall(r"\b(?:LDG|STG|LDGSTS)\S*\.128", sass)),
        # Accesses with a policy for L2, a priority in L1, or streaming. EF is evict first.
        "hints": len(re.findall(r"\b(?:ld|st|cp)\.\S*(?:L2::cache_hint|L1::|\.cs\b)", ptx)),
        "evict_first": len(re.findall(r"\b(?:LDG|STG|LDGSTS)\S*\.EF\b", sass)),
        "local_accesses": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "special": len(re.findall(r"\bMUFU\b", sass)),
        # ptxas says so where it cannot keep two products of a warpgroup in flight.
        "serialised": len(re.findall(r"wgmma.* serialized", report)),
        # Those of all partitions: the compiler adds the warps of the others.
        "occupancy": occupancy(registers, shared, compiled.metadata.num_warps, arch),
    }


def _assemble(ptx: str, arch: int) -> tuple[str, str]:
    """(ptxas's report, SASS) with the tools in Triton's own package."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        binary = Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        # sm_90a rather than sm_90: wgmma exists only in the architecture's own instruction set.
        target = re.findall(r"\.target (\w+)", ptx)[0]
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", source, "-o", binary]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        dump = [tools / "cuobjdump", "-sass", binary]
        sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return report, sass


def occupancy(registers: int, shared: int, warps: int, arch: int) -> float:
    """Resident warps of a multiprocessor over the most it can hold.

    Registers (allocated in 256s a warp) and shared memory (with 1 KiB of every program for the
    system) are the limits.
    """
    registers_per_warp = max(1, -(-registers * 32 // 256) * 256)
    by_registers = REGISTERS // (registers_per_warp * warps)
    most = LIMITS[arch].warps
    by_shared = LIMITS[arch].shared * 1024 // (shared + 1024)
    return min(most, min(by_registers, by_shared) * warps) / most
