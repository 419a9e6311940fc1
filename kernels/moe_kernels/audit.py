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

from moe_kernels.experts.shapes import BLOCK_ROWS, OPERATIONS, Tiles, tiles, using
from moe_kernels.gate import Choice, gate
from moe_kernels.launch import Launch, fp8_support, lowering_for, recording
from moe_kernels.schedule import schedule

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may have."""
REGISTERS, WARPS, SHARED_SM = 65536, {80: 64, 90: 64, 100: 64}, {80: 164, 90: 228, 100: 228}
"""Of a multiprocessor: registers, warps, KiB of shared memory."""
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}
FLAGS = ("SAVE", "GATHER", "GATHER_LEFT", "GATHER_RIGHT", "WEIGHTED", "SWIGLU", "FAST_SILU")
FLAGS += ("SIGMOID", "BIASED")
PLAIN = ("combine", "decode", "quantise_rows", "quantise_matrices")
ROUTING = ("gate", "histogram", "scan", "layout", "place")
"""Kernels that move, compare and sum: neither matrix units nor asynchronous copies are due."""
NAMES["float8_e4m3fn"] = "fp8e4nv"
FP8_ROWS = 64
"""Rows from which an FP8 tile is multiplied as FP8 on sm_90 and sm_100; Triton turns smaller ones,
which memory limits, into fp16."""
SIZES = {"T": 4096, "D": 2048, "F": 1024, "E": 64, "K": 8}
"""OLMoE-1B-7B's."""


class Variant(NamedTuple):
    """A change to the table's entries that bench.py and lever_kernels.py measure."""

    operations: tuple[str, ...]
    change: dict[str, Any]


VARIANTS = {
    "persistent": Variant(("up", "rows"), {"resident": 1}),
    "keep": Variant(OPERATIONS, {"keep_rows": "evict_first", "keep_matrix": "evict_last"}),
    "fast_silu": Variant(("up",), {"fast_silu": True}),
}


class Routing(NamedTuple):
    """The launches of a model's gate and schedule for one architecture."""

    model: str
    arch: int


ROUTERS = {
    "DeepSeek-V3": (256, Choice(8, "sigmoid", True, 2.5, 8, 4, 2)),
    "Kimi-K2": (384, Choice(8, "sigmoid", True, 2.827)),
    "Qwen3": (128, Choice(8, "softmax")),
    "OLMoE": (64, Choice(8, "softmax", normalise=False)),
    "Qwen1.5-MoE": (60, Choice(4, "softmax", normalise=False)),
    "512 experts, top 16": (512, Choice(16, "softmax")),
}
"""Experts and gate of what is audited."""


class Case(NamedTuple):
    """The API's launches at one dtype and block size, for one architecture."""

    dtype: str
    block_rows: int
    arch: int
    variant: str | None = None


def launches(case: Case) -> list[Launch]:
    """What a forward pass without gradients, one with them, and decoding launch, each once, in 16
    bits also with FP8 products where the architecture has them; of a variant those that it changes.
    """
    from moe_kernels import experts, experts_fp8
    from moe_kernels.schedule.api import schedule_shape

    def arguments(tokens: int) -> tuple[Any, ...]:
        _, d, f, e, k = SIZES.values()
        x = ShapeDtypeStruct((tokens, d), case.dtype)
        weights = ShapeDtypeStruct((tokens, k), jnp.float32)
        gate_up = ShapeDtypeStruct((e, d, 2 * f), case.dtype)
        down = ShapeDtypeStruct((e, f, d), case.dtype)
        return x, weights, gate_up, down, schedule_shape(tokens, k, e, case.block_rows)

    def train(mixture: Callable[..., Any], *inputs: Any) -> Any:
        out, pull = jax.vjp(partial(mixture, plan=inputs[-1]), *inputs[:-1])
        return pull(out)

    jax.clear_caches()  # a function that was traced for another architecture is not traced again
    with recording(case.arch) as found, using(entries(case)):
        inputs = arguments(SIZES["T"])
        fp8 = jnp.dtype(case.dtype).itemsize == 2 and fp8_support().name != "none"
        for mixture in (experts.mixture, experts_fp8.mixture)[: 1 + fp8]:
            jax.eval_shape(mixture, *inputs)
            jax.eval_shape(partial(train, mixture), *inputs)
        jax.eval_shape(partial(experts.grouped, gathered=True), *inputs[::2])
        if case.block_rows == BLOCK_ROWS[0]:
            jax.eval_shape(experts.mixture, *arguments(1))
    named = {describe(launch): launch for launch in found}
    if case.variant:
        plain = {describe(launch) for launch in launches(case._replace(variant=None))}
        named = {name: launch for name, launch in named.items() if name not in plain}
    return list(named.values())


def entries(case: Case) -> dict[str, Tiles]:
    """The table's tiles for a variant; none for what the table says anyhow."""
    if not case.variant:
        return {}
    operations, change = VARIANTS[case.variant]
    table = {op: tiles(op, jnp.dtype(case.dtype), case.block_rows) for op in operations}
    return {op: entry._replace(**change) for op, entry in table.items()}


def routing(case: Routing) -> list[Launch]:
    """What the model's gate and its schedule launch."""
    experts, choice = ROUTERS[case.model]
    tokens = SIZES["T"]
    logits = ShapeDtypeStruct((tokens, experts), jnp.float32)
    bias = ShapeDtypeStruct((experts,), jnp.float32) if choice.function == "sigmoid" else None
    chosen = ShapeDtypeStruct((tokens, choice.per_token), jnp.int32)
    jax.clear_caches()
    with recording(case.arch) as found:
        jax.eval_shape(partial(gate, choice=choice), logits, bias)
        jax.eval_shape(partial(schedule, num_experts=experts, block_rows=128), chosen)
    return found


def describe(launch: Launch) -> str:
    """Kernel and configuration, as the table shows them."""
    c, dtype = launch.constants, NAMES[launch.inputs[0].dtype.name]
    name = launch.kernel.__name__.removesuffix("_kernel")
    keys = (
        ("E", "K", "G", "BT", "C", "BM")
        if name in ROUTING
        else ("BM", "BN", "BK", "BD", "ROWS", "TILE")
    )
    sep = " " if name in ROUTING else "x"
    tile = sep.join(f"{key if name in ROUTING else ''}{c[key]}" for key in keys if key in c)
    flags = [key.lower() for key in FLAGS if c.get(key)]
    result = NAMES[launch.outputs[0].dtype.name]
    if name not in ROUTING and result != dtype:
        dtype = f"{dtype}>{result}"
    if c.get("STRIDE_K") == 1:
        flags.append("transposed")
    if c.get("PROGRAMS", 0) < c.get("BLOCKS", 0) * c.get("TILES", 0):
        flags.append("persistent")
    flags += [f"{key}={c[key]}".lower() for key in ("KEEP_ROWS", "KEEP_MATRIX") if c.get(key)]
    tuning = f"{launch.tuning.warps}w{launch.tuning.stages}s"
    return " ".join([name, dtype, tile, tuning, *flags])


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """A row of the table."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton asks for a choice
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
        "special": len(re.findall(r"\bMUFU\b", sass)),
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
    if row["kernel"] in (*ROUTING, *PLAIN):
        return
    if not row["cp_async"]:
        yield "no asynchronous copy"
    if not row["mma"] and not row["config"].startswith("fp32"):
        yield "no product on the matrix units"
    if row["config"].startswith("fp8"):
        rows = int(row["config"].split()[1].partition("x")[0])
        if rows >= FP8_ROWS and row["fp8_mma"] < row["mma"]:
            yield f"{row['mma'] - row['fp8_mma']} of {row['mma']} products not on FP8"


def audit_case(case: Case | Routing) -> list[dict[str, Any]]:
    """The rows of one case."""
    found = routing(case) if isinstance(case, Routing) else launches(case)
    return [compile_launch(launch, case.arch) for launch in found]


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
    dtypes = ("bfloat16", "float32", "float16") if options.all else ("bfloat16", "float32")
    blocks = BLOCK_ROWS if options.all else (BLOCK_ROWS[0], BLOCK_ROWS[-1])
    cases: list[Case | Routing] = [Routing(m, a) for m in ROUTERS for a in options.arch]
    cases += [Case(d, b, a) for d in dtypes for b in blocks for a in options.arch]
    cases += [Case("bfloat16", BLOCK_ROWS[-1], a, v) for a in options.arch for v in VARIANTS]
    rows, broken = [], []
    widths = {"kernel": 17, "config": 68, "arch": 4, "registers": 9, "spill_bytes": 11}
    widths |= {"shared_bytes": 12, "cp_async": 8, "mma": 4, "fp8_mma": 7, "wide_accesses": 13}
    widths |= {"local_accesses": 14, "special": 7, "occupancy": 9}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for arch in options.arch:
        with lowering_for(arch):
            if (route := fp8_support()).name == "none":
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
