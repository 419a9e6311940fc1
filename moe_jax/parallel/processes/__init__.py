"""Several processes that train one run: found, connected, told to stop, and ended together.

found.py  flags, SLURM, environment     peers.py   what processes tell each other
start.py  meeting and JAX's runtime     hub.py     process 0's side     tunnel.py, wire.py
"""

from moe_jax.parallel.processes.peers import ALONE, LOST_CODE, Peers
from moe_jax.parallel.processes.start import connected

__all__ = ["ALONE", "LOST_CODE", "Peers", "connected"]
