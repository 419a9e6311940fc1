"""Layers in the model's order, and as the devices of a schedule hold them."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.parallel.schedules import PipelineSchedule


def piece_numbers(schedule: PipelineSchedule) -> np.ndarray:
    """int[G, chunks]: the number of the piece that each device has as each of its chunks."""
    chunks = len(schedule.positions) // schedule.devices
    numbers = np.zeros((schedule.devices, chunks), np.int32)
    for (device, chunk), number in schedule.positions.items():
        numbers[device, chunk] = number
    return numbers


def to_places(layers: Array, placement: np.ndarray) -> Array:
    """[layers, …] of the model -> [G · chunks, layers of a piece, …] of the devices."""
    pieces = layers.reshape(placement.max() + 1, -1, *layers.shape[1:])
    order = placement.reshape(-1)
    # One piece a device in order is the common case, and takes no gather.
    return pieces if np.array_equal(order, np.arange(len(order))) else pieces[order]


def from_places(places: Array, placement: np.ndarray) -> Array:
    """The sum of the copies of each piece, in the model's order: the transpose of to_places."""
    order = placement.reshape(-1)
    if not np.array_equal(order, np.arange(len(order))):
        empty = jnp.zeros((placement.max() + 1, *places.shape[1:]), places.dtype)
        places = empty.at[order].add(places)
    return places.reshape(-1, *places.shape[2:])
