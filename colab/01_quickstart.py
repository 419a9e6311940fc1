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
# # Train a mixture of experts and look at its routing
#
# Trains the `tiny` preset for a few minutes on the text of Python's own standard library, then
# shows which experts the tokens went to. A CPU is enough. On a GPU the settings `auto` choose what
# runs: a T4 computes in float32 on XLA's path, because it has no bfloat16. An L4, A100 or H100
# computes in bfloat16, with the Triton kernels where `EXTRA` is `[kernels]`. No GPU path has been
# run yet.
#
# This cell installs moe_jax where it is missing, as in Colab. Write the repository's address there
# first. The JAX and the NumPy that are there stay as they are.

# %%
import importlib.util
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ADDRESS = ""  # of the repository, as for git clone
EXTRA = ""

if importlib.util.find_spec("moe_jax") is None:
    assert ADDRESS, "moe_jax is not installed: set ADDRESS to that of the repository"
    kept = [d for d in distributions() if d.name.startswith(("jax", "numpy"))]
    Path("kept.txt").write_text("\n".join(f"{d.name}=={d.version}" for d in kept))
    source = f"moe_jax{EXTRA} @ git+{ADDRESS}"
    install = [sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", source]
    subprocess.run(install, check=True)

# %%
import os
from dataclasses import replace

from IPython.display import Image, display

from moe_jax.config.presets import PRESETS
from moe_jax.runs.load import load_run
from moe_jax.runs.notebook import following
from moe_jax.runs.run import run_training

# %% [markdown]
# Every setting is a field of a frozen dataclass. `STEPS=…` in the environment shortens the run.

# %%
config = PRESETS["tiny"]
steps = int(os.environ.get("STEPS", 300))
config = replace(config, steps=steps, evaluate_every=steps // 5, out=f"runs/quickstart-{steps}")
config.model

# %% [markdown]
# Train, and watch. On the right each row is an expert: white has the mean load. Run the cell again
# after an interruption and it continues where it was.

# %%
with following(config.out):
    out = run_training(config)

# %% [markdown]
# How well it predicts text it has never seen, beside what compressors make of the same text.

# %%
display(Image(str(out / "plots" / "loss.png")))

# %% [markdown]
# Which expert was busy when: white is balanced, red is overloaded. The router bias evens it out
# without any balance gradient worth mentioning.

# %%
display(Image(str(out / "plots" / "load.png")))
display(Image(str(out / "plots" / "router.png")))

# %% [markdown]
# Where single tokens go: the experts that each token of a line of Python chooses, layer by layer.

# %%
run = load_run(out)
for token, experts in run.routing("def add(x, y):\n    return x + y\n"):
    print(f"{token!r:14}", *experts)

# %% [markdown]
# And a continuation.

# %%
print(run.complete("import os\n\n\ndef ", tokens=60))
