"""Recording where a trained model sends its tokens (placement/trace.py)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Int

from moe_jax.base.errors import require
from moe_jax.model.abstract import graph_of
from moe_jax.placement.trace import TraceWriter
from moe_jax.runs.load import Trained


def record_routing(
    run: Trained, texts: Iterable[tuple[str, str]], path: Path, *, domains: Sequence[str]
) -> int:
    """Writes the routing of (domain, text) pairs to a trace, in their order.

    Each text is read in windows of data.length tokens, as in training. A rest shorter than a window
    is not read. Decoding a text token by token routes it the same way. Returns the number of tokens
    in the trace. UserError: a dense model, or no text as long as a window.
    """
    model = run.config.model
    require(model.moe_layers > 0, "a dense model (dense_layers equals layers) has no routing")
    graph = graph_of(model)
    length = run.config.data.length

    @jax.jit
    def chosen(parameters: Any, router: Any, tokens: Int[Array, "1 L"]) -> Int[Array, "L layers K"]:
        merged = nnx.merge(graph, parameters, router)
        _, stats = merged.hidden(tokens, jnp.ones_like(tokens))  # one document, segment 1
        assert stats is not None
        assert stats.experts is not None
        return jnp.swapaxes(stats.experts[:, 0], 0, 1)  # [layers, 1, L, K] -> [L, layers, K]

    written = 0
    window = jax.ShapeDtypeStruct((1, length), jnp.int32)
    routed = jax.eval_shape(chosen, run.state.parameters, run.state.router, window)
    with TraceWriter(
        path,
        layers=model.moe_layers,
        experts=model.moe.experts,
        per_token=routed.shape[2],  # fewer than model.moe.slots where only training rounds
        domains=domains,
        note=f"preset {run.config.preset}, step {run.step}",
    ) as writer:
        for domain, text in texts:
            tokens = np.asarray([run.tokenizer.bos, *run.tokenizer.encode(text)], np.int32)
            for start in range(0, len(tokens) - length + 1, length):
                window = jnp.asarray(tokens[None, start : start + length])
                writer.append(
                    np.asarray(chosen(run.state.parameters, run.state.router, window)), domain
                )
                written += length
    require(written > 0, f"no text has the {length} tokens of one window: give longer ones")
    return written
