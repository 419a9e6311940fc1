"""A launch as one line of text: kernel, dtypes, tile, tuning and flags."""

from typing import Any

from moe_kernels.launch import Launch

DTYPE_NAMES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "int32": "i32",
    "float8_e4m3fn": "fp8e4nv",
}
"""Triton's names of dtypes."""
ROUTING_KERNELS = ("gate", "histogram", "scan", "layout", "place")
"""The gate's and the schedule's. They compare and add, and have no tile of a matrix."""
FLAGS = (
    "SAVE",
    "GATHER",
    "GATHER_LEFT",
    "GATHER_RIGHT",
    "WEIGHTED",
    "SWIGLU",
    "FAST_SILU",
    "SIGMOID",
    "BIASED",
)
"""Constants that are named where they are true."""


def describe(launch: Launch) -> str:
    """Kernel and configuration, as the audit's table shows them. Equal text is an equal program."""
    constants = launch.constants
    name = launch.kernel.__name__.removesuffix("_kernel")
    tuning = f"{_warps(launch)}w{launch.tuning.stages}s"
    return " ".join(
        [name, _dtypes(name, launch), _tile(name, constants), tuning, *_flags(constants)]
    )


def _warps(launch: Launch) -> str:
    """Warps, or those of each partition: of those that multiply and of the one that loads."""
    warps = str(launch.tuning.warps)
    if "LOADERS" not in launch.constants:
        return warps
    return "+".join([warps] * launch.constants["TAKERS"] + [str(launch.constants["LOADERS"])])


def _dtypes(name: str, launch: Launch) -> str:
    """The first input's dtype, then the first output's where it differs."""
    given = DTYPE_NAMES[launch.inputs[0].dtype.name]
    result = DTYPE_NAMES[launch.outputs[0].dtype.name]
    # Routing kernels all turn floats or integers into integers.
    return given if given == result or name in ROUTING_KERNELS else f"{given}>{result}"


def _tile(name: str, constants: dict[str, Any]) -> str:
    if name in ROUTING_KERNELS:
        keys = ("E", "K", "G", "BT", "C", "BM")
        return " ".join(f"{key}{constants[key]}" for key in keys if key in constants)
    keys = ("BM", "BN", "BK", "BD", "ROWS", "TILE")
    return "x".join(str(constants[key]) for key in keys if key in constants)


def _flags(constants: dict[str, Any]) -> list[str]:
    flags = [key.lower() for key in FLAGS if constants.get(key)]
    if constants.get("STRIDE_K") == 1:
        flags.append("transposed")
    if "PROGRAMS" in constants and constants["PROGRAMS"] < constants["BLOCKS"] * constants["TILES"]:
        flags.append("persistent")
    eviction = ("KEEP_ROWS", "KEEP_MATRIX", "STORE")
    return flags + [f"{key}={constants[key]}".lower() for key in eviction if constants.get(key)]
