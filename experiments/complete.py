"""`moe-jax complete` for a checkout. Body and description: moe_jax/commands/complete.py."""

from moe_jax.__main__ import run

if __name__ == "__main__":
    run("complete")
