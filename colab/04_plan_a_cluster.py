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
# # Plan a training run for GPUs that you do not have
#
# How much memory does a step need on a card, and how long does it take? XLA compiles the very step
# of the training program for GPUs that are absent, and the compiled program is read. Nothing here
# runs on a GPU. All times are PREDICTED, and no GPU has confirmed them. The published steps in
# `docs/predict.md` say how far off such predictions are.
#
# This cell installs moe_jax where it is missing, as in Colab. Write the repository's address there
# first. The JAX and the NumPy that are there stay as they are. The compiler is a download of 120
# MB where JAX came without CUDA.

# %%
import importlib.util
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ADDRESS = ""  # of the repository, as for git clone
# A JAX with CUDA has the compiler for absent GPUs.
EXTRA = "[kernels]" if importlib.util.find_spec("jax_plugins") else "[predict]"

if importlib.util.find_spec("moe_jax") is None:
    assert ADDRESS, "moe_jax is not installed: set ADDRESS to that of the repository"
    kept = [d for d in distributions() if d.name.startswith(("jax", "numpy"))]
    Path("kept.txt").write_text("\n".join(f"{d.name}=={d.version}" for d in kept))
    source = f"moe_jax{EXTRA} @ git+{ADDRESS}"
    install = [sys.executable, "-m", "pip", "install", "-q", "-c", "kept.txt", source]
    subprocess.run(install, check=True)

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"  # also where there is a GPU: nothing runs on it
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # the compiler warns of memory in its own words

from moe_jax.parallel.schedules import build
from moe_jax.parallel.simulate import simulate
from moe_jax.predict.answer import answer, read_command
from moe_jax.predict.figures import draw
from moe_jax.runs.notebook import show
from moe_jax.study.gantt import draw_schedules
from moe_jax.study.lessons import draw_answers

# %% [markdown]
# ## One plan
#
# The options are those of `experiments/predict.py`: a preset, a card, the number of GPUs, and how
# the work is split. Here 16 GPUs of H100's kind share the experts of Qwen3-30B. On top is the
# memory of a GPU by kind. Then comes the time of a step with its interval. At the bottom is one
# layer: transfers lie under computation, or they do not.
#
# **Change** `--batch`, or add `--model.remat none`.

# %%
plan = "qwen3_30b_a3b --hardware h100 --devices 16 --parallel.expert 16 --batch 16"
found = answer(*read_command(plan.split()))
show(draw(found.memory, found.prediction, plan))

# %% [markdown]
# ## Several plans
#
# Red does not fit, and its time is grey. The same program is compiled for each card, which takes
# about half a minute of one core. It is kept in the cache.
#
# **Change** a plan: other cards are `h200`, `a100`, `l40s`, `l4`, `rtx4090`, `t4` and `b200`.

# %%
plans = {
    "OLMoE, 4 RTX 4090": "olmoe_1b_7b --hardware rtx4090 --devices 4 --parallel.expert 4 --batch 4",
    "OLMoE, 8 L40S": "olmoe_1b_7b --hardware l40s --devices 8 --parallel.expert 8 --batch 8",
    "OLMoE, 8 H100": "olmoe_1b_7b --hardware h100 --devices 8 --parallel.expert 8 --batch 8",
}
answers = {name: answer(*read_command(text.split())) for name, text in plans.items()}
show(draw_answers(answers))

# %% [markdown]
# ## A pipeline
#
# With a pipeline each GPU has some layers, and micro-batches pass through them. A schedule is an
# order of their forward and backward passes. Grey is idle time. It is simulated: an operation
# takes one unit of time.
#
# **Change** `microbatches`, or the names: `gpipe`, `1f1b`, `interleaved`, `zb-h1`, `zb-h2`,
# `zb-v`, `dualpipe`, `dualpipev`.

# %%
names = ["gpipe", "1f1b", "zb-h1"]
schedules = {name: build(name, stages=4, microbatches=8) for name in names}
timelines = {name: simulate(schedule).timeline for name, schedule in schedules.items()}
show(draw_schedules(timelines, "4 stages, 8 micro-batches, SIMULATED"))
