"""`moe-jax teacher-text` for a checkout. Body and description: moe_jax/commands/teacher_text.py."""

from moe_jax.__main__ import run

if __name__ == "__main__":
    run("teacher-text")
