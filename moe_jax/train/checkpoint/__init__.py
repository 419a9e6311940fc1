"""Checkpoints: written aside, opened again, and never lost to a read that fails.

checkpoints.py  save and restore          folder.py    which steps are there, and which may go
manifest.py     hashes of every file      arrays.py    what Orbax and tensorstore are asked for
"""

from moe_jax.train.checkpoint.checkpoints import Checkpoints, Restored
from moe_jax.train.checkpoint.folder import (
    EXPERTS,
    FORMAT,
    VALIDATION,
    Extra,
    evaluated_bits,
    read_errors,
    steps_in,
    unfinished_folder,
)
from moe_jax.train.checkpoint.manifest import MANIFEST

__all__ = [
    "EXPERTS",
    "FORMAT",
    "MANIFEST",
    "VALIDATION",
    "Checkpoints",
    "Extra",
    "Restored",
    "evaluated_bits",
    "read_errors",
    "steps_in",
    "unfinished_folder",
]
