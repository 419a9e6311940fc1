"""What the executor takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax import Array

PIPE = "pipe"
"""The mesh axis of the pipeline."""
Tree = Any


@dataclass(frozen=True)
class Stages:
    """The model as the executor sees it."""

    first: Callable[[Tree, Tree], Array]
    """(shared, c) -> x, the input of the first layer. c is (constants, context)."""
    layer: Callable[[Tree, Array, Tree], tuple[Array, Array, Tree]]
    """(p, x, (own, c)) -> (y, loss, others): a layer with parameters p and constants `own`."""
    last: Callable[[Tree, Array, Tree], tuple[Array, Tree]]
    """(shared, y, c) -> (loss, results), from the last layer's output."""


class Arguments(NamedTuple):
    """The arrays of one update."""

    shared: Tree
    """Parameters of `first` and `last`."""
    layers: Tree
    """Parameters of all layers, with a leading layer axis."""
    own: Tree
    """Constants of all layers, with a leading layer axis."""
    constants: Tree
    """Constants of all micro-batches, such as a teacher's parameters."""
    contexts: Tree
    """What each micro-batch has of its own, with a leading micro-batch axis."""


class Result(NamedTuple):
    """Sums over all micro-batches."""

    loss: Array
    """Of `last` and of all layers."""
    shared: Tree
    """Gradients."""
    layers: Tree
    """Gradients, with a leading layer axis."""
    others: Tree
    """Of every layer, with a leading layer axis."""
    results: Tree
    """Of `last`."""
