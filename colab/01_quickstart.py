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
# shows which experts the tokens went to. Runs on a CPU or on any Colab GPU.
#
# Install first. In Colab, after cloning the repository:
# `!pip install -q -e .` (a GPU runtime: `!pip install -q -e '.[cuda]'`), then restart the session.

# %%
import os
from dataclasses import replace
from pathlib import Path

from IPython.display import Image, display

from moe_jax.config.presets import PRESETS
from moe_jax.runs.run import run_training
from moe_jax.runs.load import load_run

# %% [markdown]
# Every setting is a field of a frozen dataclass. `STEPS=…` in the environment shortens the run.

# %%
config = PRESETS["tiny"]
steps = int(os.environ.get("STEPS", config.steps))
config = replace(config, steps=steps, out=os.environ.get("OUT", "runs/quickstart"))
config.model

# %% [markdown]
# Train. Run the cell again after an interruption and it continues where it was.

# %%
out = Path(run_training(config))

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
