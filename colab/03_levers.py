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
# # Three levers, small enough for a CPU
#
# An article on DeepSeek names three levers: low-level engineering, hot and cold experts, and
# learning from a teacher. Each gets one small experiment here, with a baseline beside it. A CPU is
# enough. A T4 computes in float32 through XLA.
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

from moe_jax.base.machine import gemm_rate
from moe_jax.commands.complete import Settings, complete, describe
from moe_jax.commands.train import read_command
from moe_jax.config import DecodePlacement
from moe_jax.runs.notebook import compared, following, show, show_table
from moe_jax.runs.run import run_training
from moe_jax.study.layer_case import Shape
from moe_jax.study.lessons import draw_speeds, layer_speeds

STEPS = int(os.environ.get("STEPS", "150"))
short = f"tiny --steps {STEPS} --evaluate-every {max(1, STEPS // 5)} --batch 8 --samples 0"
data = "--data.validation-tokens 20000"

# %% [markdown]
# ## Lever 1: the same formula, better engineered
#
# One mixture-of-experts layer, forward and backward, in two implementations that give the same
# numbers. `reference` is the formula. `xla` sorts tokens by expert and multiplies in dense blocks.
# The dotted line is a plain matrix product, which no implementation exceeds.
#
# **Change** `experts` to 64, or `tokens` to 512. Which implementation suffers?

# %%
speeds = layer_speeds(Shape(tokens=2048, width=256, hidden=128, experts=32, per_token=4))
show(draw_speeds(speeds, "GFLOP/s", reference=gemm_rate("float32") / 1e9))

# %% [markdown]
# ## A model to work with
#
# It is the teacher of lever 3, and its experts are placed in lever 2. The first run also prepares
# the text.

# %%
teacher = read_command(f"{short} {data}".split())
with following(teacher.out):
    run_training(teacher)

# %% [markdown]
# ## Lever 2: hot and cold experts
#
# A model decodes while only a part of its experts is in memory. The others are read when the
# router asks for them. The text is the same for every budget. All experts of this model take 2.4
# MB.
#
# **Change** the budgets, or `policy` to `lru`: which experts stay?

# %%
shown = {}
for budget in ("2.4MB", "1.2MB", "0.8MB"):
    placement = DecodePlacement(device_budget=budget, policy="lfru")
    done = complete(Settings(run=teacher.out, tokens=64, placement=placement))
    shown[f"{budget}: {done.traffic.hit_rate:.0%} hits"] = 1 / done.seconds
    print(budget, describe(done, budget), "\n")
show(draw_speeds(shown, "tokens/s, decoding"))

# %% [markdown]
# ## Lever 3: a teacher
#
# Two students with half the width of the teacher see the same batches. One learns from the text
# alone. The other also learns what the teacher makes of it. The teacher's own training is not
# counted here.
#
# **Change** `alpha`: 0 is the text alone, 1 the teacher alone.

# %%
student = "--model.width 64 --model.dense-hidden 128 --model.moe.expert-hidden 32"
alone = read_command(f"{short} {data} {student}".split())
with following(alone.out):
    run_training(alone)

# %%
lesson = f"--distill.teacher {teacher.out} --distill.alpha 0.5"
taught = read_command(f"{short} {data} {student} {lesson}".split())
with following(taught.out):
    run_training(taught)

# %%
runs = {"teacher": teacher.out, "student alone": alone.out, "student with teacher": taught.out}
show(compared(runs, "Training loss", "Held-out text"))

# %%
show_table(runs)

# %% [markdown]
# These are examples with one seed. The measurements have controls, seeds and intervals:
# `docs/results/` holds the answers, and `experiments/` the commands.
