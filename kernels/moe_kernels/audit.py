"""What every kernel compiles to, on GPUs that need not be there.

    python -m moe_kernels.audit [--arch 80 90 100] [--all] [--json FILE]

The kernels' own API is traced at real sizes and every launch it makes is compiled for each
architecture. Registers and spills are ptxas's; the rest is counted in the SASS and the PTX. Exits
with 1, naming the rows, where a rule is broken: spills, local memory, more shared memory than the
architecture has, no product on the matrix units (on their FP8 inputs, for the FP8 kernels), or no
asynchronous copy, where they are due.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from moe_kernels.launch import Launch, fp8_route, lowering_for, recording

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may have."""
REGISTERS, WARPS, SHARED_SM = 65536, {80: 64, 90: 64, 100: 64}, {80: 164, 90: 228, 100: 228}
"""Of a multiprocessor: registers, warps, KiB of shared memory."""
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}
NAMES["float8_e4m3fn"] = "fp8e4nv"
STREAMING = {"combine", "quantise_rows", "quantise_matrices"}
"""Kernels that read once and multiply nothing."""
FP8_ROWS = 64
"""Rows from which an FP8 tile is multiplied as FP8 on sm_90 and sm_100; Triton turns smaller ones,
which memory limits, into fp16."""
SIZES = {"T": 4096, "D": 2048, "F": 1024, "E": 64, "K": 8}
"""OLMoE-1B-7B's."""


class Case(NamedTuple):
    """The API's launches at one dtype and block size, for one architecture."""

    dtype: str
    block_rows: int
    arch: int


def launches(case: Case) -> list[Launch]:
    """What a forward pass without gradients and one with them launch, each kernel once; in 16 bits
    also with FP8 products, where the architecture has them."""
    from moe_kernels import experts, experts_fp8
    from moe_kernels.schedule.api import schedule_shape

    t, d, f, e, k = SIZES.values()
    dtype = jnp.dtype(case.dtype)
    arrays = (
        ShapeDtypeStruct((t, d), dtype),
        ShapeDtypeStruct((t, k), jnp.float32),
        ShapeDtypeStruct((e, d, 2 * f), dtype),
        ShapeDtypeStruct((e, f, d), dtype),
    )
    plan = schedule_shape(t, k, e, case.block_rows)

    def train(mixture: Callable[..., Any], *inputs: Any) -> Any:
        out, pull = jax.vjp(partial(mixture, plan=inputs[-1]), *inputs[:-1])
        return pull(out)

    jax.clear_caches()  # a function that was traced for another architecture is not traced again
    with recording(case.arch) as found:
        fp8 = dtype.itemsize == 2 and fp8_route().name != "none"
        for mixture in (experts.mixture, experts_fp8.mixture)[: 1 + fp8]:
            jax.eval_shape(mixture, *arrays, plan)
            jax.eval_shape(partial(train, mixture), *arrays, plan)
    return list({describe(launch): launch for launch in found}.values())


def describe(launch: Launch) -> str:
    """Kernel and configuration, as the table shows them."""
    c, dtype = launch.constants, NAMES[launch.inputs[0].dtype.name]
    result = NAMES[launch.outputs[0].dtype.name]
    dtype = dtype if result == dtype else f"{dtype}>{result}"
    tile = "x".join(str(c[key]) for key in ("BM", "BN", "BK", "BD", "ROWS", "TILE") if key in c)
    flags = [
        key.lower() for key in ("SAVE", "GATHER_LEFT", "GATHER_RIGHT", "WEIGHTED") if c.get(key)
    ]
    if c.get("STRIDE_K") == 1:
        flags.append("transposed")
    name = launch.kernel.__name__.removesuffix("_kernel")
    tuning = f"{launch.tuning.warps}w{launch.tuning.stages}s"
    return " ".join([name, dtype, tile, tuning, *flags])


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """A row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arrays = (*launch.inputs, *launch.outputs)
    names = launch.kernel.arg_names
    signature = dict.fromkeys(names, "constexpr")
    signature |= {n: f"*{NAMES[a.dtype.name]}" for n, a in zip(names, arrays, strict=False)}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    constants = {(names.index(key),): value for key, value in launch.constants.items()}
    source = ASTSource(launch.kernel, signature, constants, aligned)
    options = {"num_warps": launch.tuning.warps, "num_stages": launch.tuning.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    kernel, _, config = describe(launch).partition(" ")
    return {"kernel": kernel, "config": config, "arch": arch} | measure(compiled, arch, launch)


def measure(compiled: Any, arch: int, launch: Launch) -> dict[str, int | float]:
    """Counts from ptxas's report, the PTX and the SASS."""
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    report, sass = assemble(ptx, arch)
    registers = int(next(iter(re.findall(r"Used (\d+) registers", report)), 0))
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report)]
    return {
        "registers": registers,
        "spill_bytes": sum(spills),
        "shared_bytes": shared,
        "cp_async": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        "mma": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
        "fp8_mma": len(re.findall(r"mma\S*(?:\.e4m3\.e4m3|::f8f6f4)", ptx)),
        "wide_accesses": len(re.findall(r"\b(?:LDG|STG|LDGSTS)\S*\.128", sass)),
        "local_accesses": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "occupancy": occupancy(registers, shared, launch.tuning.warps, arch),
    }


def assemble(ptx: str, arch: int) -> tuple[str, str]:
    """(ptxas's report, SASS) with the tools in Triton's own package."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        target = re.findall(r"\.target (\w+)", ptx)[0]
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target}", source, "-o", binary]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        dump = [tools / "cuobjdump", "-sass", binary]
        sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    return report, sass


def occupancy(registers: int, shared: int, warps: int, arch: int) -> float:
    """Resident warps of a multiprocessor as a fraction of its most: by registers (in 256s a warp)
    and shared memory (1 KiB of a program is the system's)."""
    by_registers = REGISTERS // (max(1, -(-registers * 32 // 256) * 256) * warps)
    by_shared = SHARED_SM[arch] * 1024 // (shared + 1024)
    return min(WARPS[arch], min(by_registers, by_shared) * warps) / WARPS[arch]


def faults(row: dict[str, Any]) -> Iterator[str]:
    """Rules that the row breaks."""
    limit = SHARED_LIMIT[row["arch"]]
    if row["spill_bytes"] or row["local_accesses"]:
        yield f"{row['spill_bytes']} bytes spilled, {row['local_accesses']} local accesses"
    if row["shared_bytes"] > limit:
        yield f"{row['shared_bytes']} bytes of shared memory, above {limit}"
    if row["kernel"] in STREAMING:
        return
    if not row["cp_async"]:
        yield "no asynchronous copy"
    if not row["mma"] and not row["config"].startswith("fp32"):
        yield "no product on the matrix units"
    if row["config"].startswith("fp8"):
        rows = int(row["config"].split()[1].partition("x")[0])
        if rows >= FP8_ROWS and row["fp8_mma"] < row["mma"]:
            yield f"{row['mma'] - row['fp8_mma']} of {row['mma']} products not on FP8"


def audit_case(case: Case) -> list[dict[str, Any]]:
    """The rows of one case."""
    return [compile_launch(launch, case.arch) for launch in launches(case)]


def show(row: dict[str, Any], widths: dict[str, int]) -> str:
    """A line of the table."""
    values = {k: f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in row.items()}
    return "  ".join(values[key].ljust(width) for key, width in widths.items())


def main(argv: Sequence[str]) -> int:
    """Compiles, prints, writes; 1 if a rule is broken."""
    parser = argparse.ArgumentParser(description="What every kernel compiles to.")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--all", action="store_true", help="float16 and every block size as well")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    dtypes = ("bfloat16", "float32", "float16") if options.all else ("bfloat16", "float32")
    blocks = (16, 32, 64, 128) if options.all else (16, 128)
    cases = [Case(d, b, a) for d in dtypes for b in blocks for a in options.arch]
    rows, broken = [], []
    widths = {"kernel": 17, "config": 42, "arch": 4, "registers": 9, "spill_bytes": 11}
    widths |= {"shared_bytes": 12, "cp_async": 8, "mma": 4, "fp8_mma": 7, "wide_accesses": 13}
    widths |= {"local_accesses": 14, "occupancy": 9}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for arch in options.arch:
        with lowering_for(arch):
            if (route := fp8_route()).name == "none":
                print(f"no FP8 rows for {arch}: {route.reason}")
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for found in pool.map(audit_case, cases):
            for row in found:
                rows.append(row)
                print(show(row, widths), flush=True)
                broken += [f"{show(row, widths)}: {fault}" for fault in faults(row)]
    if options.json:
        unfinished = options.json.with_suffix(".partial")
        unfinished.write_text(json.dumps(rows, indent=1))
        unfinished.replace(options.json)
    for line in broken:
        print(f"BROKEN {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
