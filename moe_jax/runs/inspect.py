"""Recording where a trained model sends its tokens (placement/trace.py)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Int

from moe_jax.base.errors import require
from moe_jax.distill.teacher import Teacher
from moe_jax.model.abstract import graph_of
from moe_jax.placement.trace import TraceWriter
from moe_jax.runs.load import Trained


class Routed(NamedTuple):
    """A window of a text and where the model sends its tokens."""

    domain: str
    tokens: Int[np.ndarray, "L"]
    chosen: Int[np.ndarray, "L layers K"]
    """Experts, best first. The number of experts stands for no expert."""


def routed_windows(
    model: Teacher, texts: Iterable[tuple[str, str]], length: int
) -> Iterator[Routed]:
    """The routing of (domain, text) pairs in windows of `length` tokens, in their order.

    A rest shorter than a window is not read. UserError: a dense model, or no text as long as a
    window.
    """
    config = model.model
    require(config.moe_layers > 0, "a dense model (dense_layers equals layers) has no routing")
    graph = graph_of(config)

    @jax.jit
    def chosen(parameters: Any, router: Any, tokens: Int[Array, "1 L"]) -> Int[Array, "L layers K"]:
        merged = nnx.merge(graph, parameters, router)
        _, stats = merged.hidden(tokens, jnp.ones_like(tokens))  # one document, segment 1
        assert stats is not None
        assert stats.experts is not None
        return jnp.swapaxes(stats.experts[:, 0], 0, 1)  # [layers, 1, L, K] -> [L, layers, K]

    is_empty = True
    for domain, text in texts:
        tokens = np.asarray([model.tokenizer.bos, *model.tokenizer.encode(text)], np.int32)
        for start in range(0, len(tokens) - length + 1, length):
            window = tokens[start : start + length]
            routed = chosen(model.parameters, model.router, jnp.asarray(window[None]))
            yield Routed(domain, window, np.asarray(routed))
            is_empty = False
    require(not is_empty, f"no text has the {length} tokens of one window: give longer ones")


def write_trace(
    windows: Iterable[Routed], path: Path, *, experts: int, domains: Sequence[str], note: str
) -> int:
    """Writes windows to a new trace file as they come. Returns the number of tokens in it."""
    written = 0
    with ExitStack() as stack:
        writer = None
        for window in windows:
            # K is the routing's own: fewer than model.moe.slots where only training rounds.
            _, layers, per_token = window.chosen.shape
            writer = writer or stack.enter_context(
                TraceWriter(
                    path,
                    layers=layers,
                    experts=experts,
                    per_token=per_token,
                    domains=domains,
                    note=note,
                )
            )
            writer.append(window.chosen, window.domain)
            written += len(window.tokens)
    return written


def record_routing(
    run: Trained, texts: Iterable[tuple[str, str]], path: Path, *, domains: Sequence[str]
) -> int:
    """Writes the routing of (domain, text) pairs to a trace, in windows of data.length tokens.

    Decoding a text token by token routes it the same way. Returns the number of tokens in the
    trace. Errors as routed_windows.
    """
    model = Teacher(run.config.model, run.state.parameters, run.state.router, run.tokenizer)
    windows = routed_windows(model, texts, run.config.data.length)
    note = f"preset {run.config.preset}, step {run.step}"
    return write_trace(windows, path, experts=model.model.moe.experts, domains=domains, note=note)
