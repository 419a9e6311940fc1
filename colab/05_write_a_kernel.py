# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write a kernel: from the reference to the audit
#
# A Triton kernel for RMSNorm, as the kernels of this repository are written: first the reference,
# then the kernel, then a test that it can fail, then a look at what it compiles to. No GPU is
# needed. Triton's interpreter runs the kernel in NumPy, and Triton's compiler compiles it for GPUs
# that are not there. The package `moe_kernels` runs on compute capability 8.0 or more. So a T4
# interprets it, too.
#
# This cell installs moe_jax where it is missing, as in Colab. Write the repository's address there
# first. The JAX and the NumPy that are there stay as they are. Triton is a download of 286 MB, for
# Linux only.

# %%
import importlib.util
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ADDRESS = ""  # of the repository, as for git clone
EXTRA = "[kernels]"

if importlib.util.find_spec("moe_jax") is None:
    assert ADDRESS, "moe_jax is not installed: set ADDRESS to that of the repository"
    kept = [d for d in distributions() if d.name.startswith(("jax", "numpy"))]
    Path("kept.txt").write_text("\n".join(f"{d.name}=={d.version}" for d in kept))
    source = f"moe_jax{EXTRA} @ git+{ADDRESS}"
    install = [sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", source]
    subprocess.run(install, check=True)

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from moe_jax.runs.notebook import show
from moe_jax.study.lessons import draw_audit, draw_errors
from moe_kernels.audit import compile_elsewhere
from moe_kernels.launch import Tuning, launch, next_power_of_two, recording

# %% [markdown]
# ## 1. The reference
#
# The specification in plain JAX, in float32: each row is divided by its root mean square.

# %%
EPSILON = 1e-6


def reference(x, scale):
    mean = jnp.mean(x.astype(jnp.float32) ** 2, axis=1, keepdims=True)
    return (x * jax.lax.rsqrt(mean + EPSILON) * scale).astype(x.dtype)


# %% [markdown]
# ## 2. The kernel
#
# A program takes `ROWS` rows. A tile's width is a power of two (`BD`), and the matrix's width
# (`D`) need not be one. So a mask says which numbers are real. Others are read as 0, and are never
# written.
#
# **Change** `/ D` to `/ BD` and run the cells below: at which widths is it wrong?


# %%
@triton.jit
def rms_norm_kernel(
    x, scale, y, T: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BD)[None, :]
    real = (row < T) & (column < D)
    value = tl.load(x + row * D + column, mask=real, other=0.0).to(tl.float32)
    mean = tl.sum(value * value, axis=1, keep_dims=True) / D
    factor = tl.load(scale + column, mask=column < D, other=0.0)
    tl.store(y + row * D + column, value * tl.rsqrt(mean + 1e-6) * factor, mask=real)


# %% [markdown]
# ## 3. The call
#
# `launch` takes a kernel like a function of arrays: inputs, shapes of the outputs, the grid of
# programs, the tuning, and constants. It works under `jax.jit`. Outputs are not initialised. In
# the interpreter they begin as NaN, so a number that the kernel forgets is seen.


# %%
def rms_norm(x, scale, rows=4):
    T, D = x.shape
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    constants = {"T": T, "D": D, "ROWS": rows, "BD": next_power_of_two(D)}
    grid = (-(-T // rows),)
    return launch(rms_norm_kernel, (x, scale), outputs, grid, Tuning(warps=4), **constants)[0]


x = jax.random.normal(jax.random.key(0), (10, 96))
print(jnp.abs(rms_norm(x, jnp.ones(96)) - reference(x, jnp.ones(96))).max())

# %% [markdown]
# ## 4. A test that can fail
#
# Widths that are no power of two, and numbers of rows that `ROWS` does not divide. float32 errors
# are about 1e-6. float16 errors are 0, drawn at 1e-8, or a unit in the last place, 1e-3. A wrong
# kernel has errors near 1, or NaN.


# %%
def largest_error(width, dtype, tokens=7):
    x = jax.random.normal(jax.random.key(width), (tokens, width)).astype(dtype)
    scale = jnp.linspace(0.5, 2, width).astype(dtype)
    return float(jnp.abs(rms_norm(x, scale) - reference(x, scale)).max())


widths = [1, 16, 31, 32, 33, 64, 96, 100, 128, 160, 255, 256]
errors = {dtype: {w: largest_error(w, dtype) for w in widths} for dtype in ("float32", "float16")}
show(draw_errors(errors, "width D"))

# %% [markdown]
# ## 5. What it compiles to
#
# `recording` notes the launch, and the audit compiles it for an L4 (sm_89) and an H100 (sm_90).
# Each thread has at most 255 registers. Where it needs more, they spill to memory. Occupancy is
# the share of a multiprocessor's warps that fit at once. `wide accesses` move 16 bytes at a time.
#
# **Change** the width to 8192, or `warps` to 8. Where do registers run out?

# %%
WIDTH = 2048
audit = {}
for rows in (1, 2, 4, 8, 16):
    with recording(90) as launches:
        rms_norm(jnp.zeros((4096, WIDTH)), jnp.ones(WIDTH), rows)
    audit[rows] = compile_elsewhere(launches[0], archs=(89, 90))
columns = ["registers", "spill_bytes", "occupancy", "wide_accesses"]
show(draw_audit(audit, columns, "rows of a program"))

# %% [markdown]
# ## 6. What is next
#
# `kernels/moe_kernels/gate/` is the shortest kernel of the repository. It has a reference, a
# kernel, and an interface with the gradient in closed form. Its tests are in
# `tests/kernels/test_gate.py`. `CONTRIBUTING.md` has the five steps. `python -m moe_kernels.audit`
# audits all kernels, and `python -m moe_kernels.soak` tries random cases.
