"""Writes the routed experts of a trained model to a folder that ExpertFiles reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moe_jax.model.trunk import sparse_experts
from moe_jax.placement.files import Layer, write_experts


def save_experts(
    folder: Path, parameters: nnx.State, *, dtype: Any = None, low_bit: bool = False
) -> int:
    """Writes the experts of the sparse blocks, one file a layer, and returns the number of layers.

    `dtype` is the type that they are rounded to, on disk and in every memory. Unset, they are not
    rounded. `low_bit` and errors are those of write_experts.
    """
    down, gate_up = sparse_experts(parameters)

    # A generator, so that one layer at a time is copied to the host.
    def layers() -> Iterator[Layer]:
        for layer in range(len(gate_up)):
            yield (
                np.asarray(gate_up[layer]).astype(dtype or gate_up.dtype),
                np.asarray(down[layer]).astype(dtype or down.dtype),
            )

    return write_experts(folder, layers(), low_bit=low_bit)
