"""`moe-jax inspect-runs` for a checkout. Body and description: moe_jax/commands/inspect_runs.py."""

from moe_jax.__main__ import run

if __name__ == "__main__":
    run("inspect-runs")
