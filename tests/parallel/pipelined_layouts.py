"""The gradient of pipelines in float64 over simulated devices, beside micro-batches on one device.

    JAX_NUM_CPU_DEVICES=8 JAX_ENABLE_X64=1 python -m tests.parallel.pipelined_layouts CASE/PIPELINE

A process of its own, as tests.parallel.layouts is, with the same kind of output.
"""

import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import (
    DistillConfig,
    ExchangeConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from moe_jax.model.layout import shardings
from moe_jax.objectives.distillation import online_objective
from moe_jax.objectives.next_token import next_token
from moe_jax.parallel.exchange import exchanging
from moe_jax.parallel.rules import batch_sharding
from moe_jax.train.engines.pipelined.engine import PipelinedEngine
from moe_jax.train.engines.pipelined.gradient import make_pipelined_gradient
from moe_jax.train.state import init_state
from moe_jax.train.step import make_gradient
from tests.parallel.layouts import (
    MLA,
    MODEL,
    MOE,
    SOFTMAX,
    but_waited,
    difference,
    in_float64,
    make_batch,
    run,
)

DEEP = replace(MODEL, layers=5)
"""One dense block and four sparse ones."""
NOISY = replace(SOFTMAX, rule="noisy_top_k")
MICROBATCHES = 4
ROWS = 16
"""Of a batch: a row of each micro-batch for four devices."""


def deep(**settings: Any) -> ModelConfig:
    return replace(DEEP, **settings)


CASES: dict[str, TrainConfig] = {
    "gqa": run(DEEP),
    "mla": run(deep(attention=MLA)),
    "dense": run(deep(layers=4, dense_layers=4)),
    "mtp": run(deep(mtp_depth=1)),
    "untied": run(deep(tied_embedding=False)),
    "remat": run(deep(remat="full")),
    "dots": run(deep(remat="dots")),
    "dropout": run(deep(dropout=0.2)),
    "noisy": run(deep(moe=NOISY)),
    "capacity": run(deep(moe=replace(MOE, capacity_factor=0.6))),
    "teacher": run(deep(), distill=DistillConfig(teacher="another model", alpha=0.5, chunk=100)),
}
PIPELINES: dict[str, ParallelConfig] = {
    "gpipe": ParallelConfig(pipe=2, data=1, schedule="gpipe"),
    "1f1b": ParallelConfig(pipe=4, data=1, schedule="1f1b"),
    "interleaved": ParallelConfig(pipe=2, data=1, schedule="interleaved", chunks=2),
    "zb-h1": ParallelConfig(pipe=4, data=1, schedule="zb-h1"),
    "zb-h2": ParallelConfig(pipe=2, data=1, schedule="zb-h2"),
    "zb-v": ParallelConfig(pipe=2, data=1, schedule="zb-v"),
    "dualpipe": ParallelConfig(pipe=2, data=1, schedule="dualpipe"),
    "dualpipev": ParallelConfig(pipe=2, data=1, schedule="dualpipev"),
    "with-data": ParallelConfig(pipe=2, data=2, schedule="zb-h1"),
    "with-fsdp": ParallelConfig(pipe=2, data=1, fsdp=2, schedule="1f1b"),
}


def with_experts(schedule: Any = "zb-h1", **exchange: Any) -> ParallelConfig:
    return ParallelConfig(
        pipe=2, data=1, expert=4, schedule=schedule, exchange=ExchangeConfig(**exchange)
    )


PIPELINES |= {
    "expert": with_experts(),
    "expert-data": ParallelConfig(pipe=2, data=2, expert=2, schedule="zb-v"),
    "expert-dualpipe": with_experts("dualpipe"),
    "expert-dualpipev": with_experts("dualpipev"),
    "weights": with_experts(kind="weights"),
    "all_gather": with_experts(kind="all_gather"),
    "chunks": with_experts("dualpipe", chunks=2),
    "copies": with_experts(kind="copies"),
    "nodes": with_experts(kind="copies", node=2),
    "overflow": with_experts("dualpipe", buffer=0.2),
}


def compare(name: str, parallel: ParallelConfig) -> float:
    """Losses, statistics and gradients of the pipeline, beside those of one device."""
    parallel = replace(parallel, microbatches=MICROBATCHES)
    config = in_float64(replace(CASES[name], batch=ROWS))
    objective = next_token
    operands: tuple[Any, ...] = ()
    if config.distill.teacher:
        objective = online_objective(config.distill, [config.model])
        other = jax.jit(lambda: init_state(replace(config, seed=1)))()
        operands = ([other.model_states()],)
    state = jax.jit(lambda: init_state(config))()
    bias = jax.tree.map(lambda b: 0.1 * jax.random.normal(jax.random.key(1), b.shape), state.router)
    batch = make_batch(config)
    key = state.step_key()
    one = replace(config, optim=OptimConfig(accumulation=MICROBATCHES))
    alone = jax.jit(make_gradient(one, objective))(state.parameters, bias, batch, key, *operands)
    devices = jax.devices()[: parallel.fixed * parallel.data]
    engine = PipelinedEngine(replace(config, parallel=parallel), devices)
    engine.check()
    with jax.set_mesh(engine.mesh), exchanging(parallel.exchange):
        gradient = make_pipelined_gradient(config, objective, engine.schedule, engine.mesh)
        trees = (state.parameters, bias, operands)
        parameters, bias, operands = jax.device_put(trees, shardings(engine.mesh, trees))
        batch = jax.device_put(batch, batch_sharding(engine.mesh))
        spread = jax.jit(gradient)(parameters, bias, batch, key, *operands)
        return difference(but_waited(jax.device_get(alone)), but_waited(jax.device_get(spread)))


def main(pairs: list[str]) -> None:
    # As in tests.parallel.layouts: the code asks for float32 by this name.
    jnp.float32 = jnp.float64
    for pair in pairs:
        name, pipeline = pair.split("/")
        print(f"{pair} {compare(name, PIPELINES[pipeline]):.3g}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
