"""The bodies of the commands: each file has `main(argv)`. moe_jax/__main__.py starts them.

They are here, and not in experiments/, because an installed package has no experiments/. The
scripts experiments/train.py, experiments/sweep.py, … start the same bodies.
"""
