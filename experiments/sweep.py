"""`moe-jax sweep` for a checkout. Body and description: moe_jax/commands/sweep.py."""

from moe_jax.__main__ import run

if __name__ == "__main__":
    run("sweep")
