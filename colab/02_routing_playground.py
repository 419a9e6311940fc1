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
# # Change a routing rule, and watch loads and loss
#
# A mixture of experts sends each token to a few experts. The routing rule decides to which ones.
# Here you see the choices of five rules on the same scores. Then you train a small model, watch
# how busy its experts are, and change the rule in one line. A CPU is enough. A T4 computes in
# float32 through XLA.
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

from moe_jax.commands.train import read_command
from moe_jax.config import MoEConfig
from moe_jax.runs.notebook import compared, following, show, show_table
from moe_jax.runs.run import run_training
from moe_jax.study.lessons import draw_choices

runs = {}

# %% [markdown]
# ## Five rules on the same scores
#
# Rows are tokens and columns are experts. A dark square is a high score, and the first experts are
# popular. A dot is a token that goes to an expert. The bars above count the tokens of each expert,
# and the dotted line is the mean.
#
# `top_k` follows the scores, so popular experts are overloaded. `token_rounding` rounds each load
# to a multiple of 4. With `expert_choice` experts choose tokens, so loads are equal, and some
# tokens get no expert. `hash` does not look at the scores. `balanced` takes experts in turn.
#
# **Change** `experts_per_token` to 1 or 4, or `seed`.

# %%
names = ["top_k", "token_rounding", "expert_choice", "hash", "balanced"]
shared = {"experts": 8, "experts_per_token": 2, "bias_rate": 0, "rounding_tile": 4}
show(draw_choices([MoEConfig(rule=n, allow_acausal=True, **shared) for n in names], seed=0))

# %% [markdown]
# ## A router that nothing balances
#
# The same options as on the command line. `bias-rate 0` and `sequence-loss 0` switch both balances
# off. On the right, each row is an expert: white has the mean load, red too much, blue too little.
# Some experts become popular and stay so. The first run also prepares the text.

# %%
STEPS = os.environ.get("STEPS", "150")
short = f"tiny --steps {STEPS} --evaluate-every {STEPS} --batch 8 --samples 0"
model = "--model.moe.experts 16 --data.validation-tokens 20000"
options = "--model.moe.bias-rate 0 --model.moe.sequence-loss 0"
config = read_command(f"{short} {model} {options}".split())
runs["no balance"] = config.out
with following(config.out):
    run_training(config)

# %% [markdown]
# ## Your turn
#
# DeepSeek-V3 has no balance loss worth mentioning. A bias on each expert's score rises while the
# expert has too few tokens, and falls while it has too many. **Change** the line `options`, run
# the cell again, and watch. For example:
#
# - `--model.moe.bias-rate 0.1` moves the bias ten times as fast: the loads swing.
# - `--model.moe.bias-rate 0 --model.moe.expert-loss 0.01` balances by a loss instead.
# - `--model.moe.rule hash --model.moe.bias-rate 0` needs no router. What does the loss say?
# - `--model.moe.capacity-factor 1.0` drops the tokens that an expert has no room for.
# - `--model.moe.experts-per-token 1 --model.moe.normalise False` sends each token to one expert.

# %%
options = "--model.moe.bias-rate 0.01"
config = read_command(f"{short} {model} {options}".split())
runs[options] = config.out
with following(config.out):
    run_training(config)

# %% [markdown]
# ## Side by side
#
# All runs of this session. Balance is a means: the loss is what counts, and the highest load
# decides how long the other experts wait.

# %%
show(compared(runs, "Training loss", "Highest expert load"))

# %%
show_table(runs)

# %% [markdown]
# One seed and a few steps of a small model show what a rule does. They do not show which rule is
# better. `experiments/` has the measurements with seeds and intervals, and `docs/routing.md` all
# rules with their sources.
