"""The memory that activations take: the least from shapes alone, and the compiled program's own.

The first is a lower bound, so that no run is refused that would fit. It leaves out the experts'
hidden values, all else that the backward pass keeps, gradients, multi-token prediction and a
teacher: `tiny` takes 6x the bound, and `small` 13x. So what was compiled is looked at as well.
"""

from typing import Any

import jax.numpy as jnp

from moe_jax.base.console import say
from moe_jax.base.machine import available_bytes
from moe_jax.config import TrainConfig
from moe_jax.model.dtype import compute_dtype


def training_bytes(config: TrainConfig, devices: int) -> int:
    """Bytes on each device that one update has in memory at once beside its state, at least.

        rows · L · (layers · D · c + max(columns · o, H · L · c)) / devices

    rows = batch / accumulation. c and o are the bytes of a value in the compute dtype and in the
    logits' type. Devices share rows, columns, heads or layers. The backward pass needs the residual
    stream [rows, L, D] of every block, whatever is recomputed. It is there while the logits are,
    [rows, L, columns]: all V columns, or `distill.chunk` of them with a teacher. It is there as
    well while a block's attention scores are, [rows, H, L, L], which only the implementation
    `reference` has.
    """
    model = config.model
    rows = config.batch // config.optim.accumulation
    streams = model.layers * model.width * compute_dtype(model).itemsize
    of_a_token = streams + _widest(config, _logit_bytes(config))
    return rows * config.data.length * of_a_token // devices


def evaluation_bytes(config: TrainConfig, devices: int) -> int:
    """As training_bytes, for a batch of held-out text: B · L · max(V · o, H · L · c) / devices.

    The evaluation takes no micro-batches and no teacher.
    """
    of_a_token = _widest(config, _whole_logit_bytes(config))
    return config.batch * config.data.length * of_a_token // devices


def say_if_too_large(program: Any) -> None:
    """Says in a line that a compiled program needs more memory than is free. It is not refused.

    XLA reserves all of it, and may touch less. The state is in memory already.
    """
    analysis = program.memory_analysis()
    available = available_bytes()
    if analysis is None or available is None or analysis.temp_size_in_bytes <= available:
        return
    needed = analysis.temp_size_in_bytes
    say(
        f"the compiled step needs {needed / 1e9:,.1f} GB beside the state, and "
        f"{available / 1e9:,.1f} GB are free: if it ends for want of memory, lower --batch or "
        "--data.length, or raise --optim.accumulation"
    )


def _widest(config: TrainConfig, logits: int) -> int:
    """Bytes of a token's logits or of its attention scores, whichever are more."""
    model = config.model
    if model.attention.implementation != "reference":
        return logits
    scores = model.attention.heads * config.data.length * compute_dtype(model).itemsize
    return max(logits, scores)


def _logit_bytes(config: TrainConfig) -> int:
    if not config.distill.teacher:
        return _whole_logit_bytes(config)
    return min(_vocabulary(config), config.distill.chunk) * jnp.dtype("float32").itemsize


def _whole_logit_bytes(config: TrainConfig) -> int:
    return _vocabulary(config) * jnp.dtype(config.model.output_dtype).itemsize


def _vocabulary(config: TrainConfig) -> int:
    assert config.model.vocabulary is not None, "use TrainConfig.resolved()"
    return config.model.vocabulary
