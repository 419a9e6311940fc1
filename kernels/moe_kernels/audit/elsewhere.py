"""Compiles a launch whose kernel is interpreted here: in a process in which it is not.

Triton's interpreter replaces functions of triton.language for the whole process.
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import ShapeDtypeStruct

from moe_kernels.audit.compile import compile_launch
from moe_kernels.launch import Launch, Tuning

HEADER = "import triton\nimport triton.language as tl\n\n\n"


def compile_elsewhere(launch: Launch, archs: Sequence[int]) -> list[dict[str, Any]]:
    """compile_launch for each of the architectures, in a process of its own.

    The kernel may be a function of a notebook. Besides its arguments it uses `triton` and `tl`
    alone. RuntimeError: it cannot be compiled.
    """
    job = {
        "name": launch.kernel.fn.__name__,
        "inputs": [(array.shape, array.dtype.name) for array in launch.inputs],
        "outputs": [(array.shape, array.dtype.name) for array in launch.outputs],
        "tuning": launch.tuning,
        "constants": launch.constants,
        "archs": list(archs),
    }
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.py"
        file.write_text(HEADER + textwrap.dedent(inspect.getsource(launch.kernel.fn)))
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(file), json.dumps(job)],
            env=environment | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise RuntimeError(f"{job['name']} cannot be compiled:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(file: str, text: str) -> None:
    """Compiles the kernel of a file, and prints the rows as JSON."""
    job = json.loads(text)
    spec = importlib.util.spec_from_file_location("kernel", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch = Launch(
        getattr(module, job["name"]),
        _arrays(job["inputs"]),
        _arrays(job["outputs"]),
        Tuning(*job["tuning"]),
        job["constants"],
        {},
    )
    print(json.dumps([compile_launch(launch, arch) for arch in job["archs"]]))


def _arrays(stored: Sequence[Any]) -> tuple[ShapeDtypeStruct, ...]:
    return tuple(ShapeDtypeStruct(tuple(shape), jnp.dtype(name)) for shape, name in stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
