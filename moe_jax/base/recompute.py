"""Derivatives that keep little."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def recomputed(function: Function) -> Function:
    """`function`, whose backward pass keeps the arguments alone and computes the rest again.

    JAX's own derivative keeps every intermediate result that it needs. All arguments are arrays.
    """

    def forward(*arguments: Any) -> tuple[Any, tuple[Any, ...]]:
        return function(*arguments), arguments

    def backward(arguments: tuple[Any, ...], cotangent: Any) -> tuple[Any, ...]:
        return jax.vjp(function, *arguments)[1](cotangent)

    kept: Any = jax.custom_vjp(function)
    kept.defvjp(forward, backward)
    return kept
