"""The assembler (ptxas) for which Triton writes its PTX.

Triton brings a ptxas of its own and stamps PTX with the version of that one. jaxlib assembles the
PTX with another ptxas. An assembler takes PTX of its own version or an older one, and refuses newer
PTX. So Triton is pointed to the oldest assembler that jaxlib may find, unless its own is older.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

VARIABLES = {"TRITON_PTXAS_PATH": "ptxas", "TRITON_PTXAS_BLACKWELL_PATH": "ptxas-blackwell"}
"""Triton's variables, and the programs in its package that they replace. Which of the two it takes
depends on the compute capability and on its version."""
PACKAGES = ("nvidia/cu13/bin/ptxas", "nvidia/cuda_nvcc/bin/ptxas")
"""Where the packages of CUDA 13 and CUDA 12 have it, below a folder of Python's path."""


class Assembler(NamedTuple):
    """A ptxas with its release, such as (12, 9)."""

    release: tuple[int, int]
    path: Path


def choose_assembler() -> None:
    """Points Triton to the oldest ptxas, once, before its first compilation.

    A variable that the user has set stays, and so does a ptxas of Triton's that is as old. Where
    none is found besides Triton's, jaxlib has one built in or fails by itself.
    """
    oldest = oldest_assembler()
    if oldest is None:
        return
    for variable, program in VARIABLES.items():
        own = release_of(bundled(program))
        if own is None or oldest.release < own:
            os.environ.setdefault(variable, str(oldest.path))


def bundled(program: str) -> Path:
    """A program in Triton's own package, which may lack it."""
    package = importlib.util.find_spec("triton")
    folder = Path(package.origin).parent if package and package.origin else Path()
    return folder / "backends/nvidia/bin" / program


@cache
def oldest_assembler() -> Assembler | None:
    """The oldest ptxas of `candidates`, None where there is none."""
    found = (Assembler(release, path) for path in candidates() if (release := release_of(path)))
    return min(found, default=None)


def candidates() -> Iterator[Path]:
    """The places in which XLA looks: Python packages, the CUDA toolkit, PATH."""
    folders = [Path(folder) / package for folder in sys.path for package in PACKAGES]
    toolkits = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders += [Path(toolkit) / "bin/ptxas" for toolkit in toolkits if toolkit]
    on_path = shutil.which("ptxas")
    folders += [Path(on_path)] if on_path else []
    return (path for path in folders if path.is_file())


def release_of(path: Path) -> tuple[int, int] | None:
    """The CUDA release of a ptxas, None for a program that cannot be run or is no ptxas."""
    try:
        command = [path, "--version"]
        text = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"release (\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None
