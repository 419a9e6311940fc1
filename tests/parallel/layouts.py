"""One update in float64 over eight simulated devices in many layouts, beside the same on one.

    JAX_NUM_CPU_DEVICES=8 JAX_ENABLE_X64=1 python -m tests.parallel.layouts CASE/LAYOUT …

A process of its own, because its devices and its number format are set before JAX starts. For each
pair it prints a line: the pair, and the largest difference relative to each array's largest value.
"""

import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.config import (
    AttentionConfig,
    DataConfig,
    DistillConfig,
    ExchangeConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from moe_jax.model.abstract import merge_with_slots
from moe_jax.model.layout import shardings
from moe_jax.moe.layer import RouterStats
from moe_jax.objectives.distillation import online_objective
from moe_jax.objectives.next_token import next_token
from moe_jax.parallel.exchange import exchanging
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import batch_sharding
from moe_jax.placement.slots import SlotPlanner
from moe_jax.train.state import TrainState, init_state
from moe_jax.train.step import make_gradient
from moe_jax.train.update import Gradient, make_update
from tests.parallel.in_place import reading_in_place

VOCABULARY = 260
GQA = AttentionConfig(kind="gqa", heads=4, kv_heads=2, head_dim=6)
MLA = AttentionConfig(kind="mla", heads=4, q_rank=8, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=6)
MOE = MoEConfig(
    experts=8,
    experts_per_token=2,
    expert_hidden=12,
    groups=4,
    groups_per_token=3,
    sequence_loss=0.1,
    expert_loss=0.1,
    device_loss=0.1,
    locality_loss=0.1,
    z_loss=0.1,
    bias_rate=0.01,
)
SOFTMAX = MoEConfig(
    experts=8, experts_per_token=2, expert_hidden=12, gate="softmax", bias_rate=0, expert_loss=0.1
)
MODEL = ModelConfig(
    vocabulary=VOCABULARY,
    width=16,
    layers=2,
    dense_layers=1,
    dense_hidden=24,
    attention=GQA,
    moe=MOE,
    init_std=0.2,
    compute_dtype="float32",
)


def run(model: ModelConfig = MODEL, **settings: Any) -> TrainConfig:
    data = DataConfig(tokenizer="bytes", length=12)
    return TrainConfig(batch=8, model=model, data=data, steps=10, **settings)


def moe(**settings: Any) -> TrainConfig:
    return run(replace(MODEL, moe=replace(MOE, **settings)))


def softmax(**settings: Any) -> TrainConfig:
    return run(replace(MODEL, moe=replace(SOFTMAX, **settings)))


CASES: dict[str, TrainConfig] = {
    "gqa": run(),
    "mla": run(replace(MODEL, attention=MLA)),
    "dense": run(replace(MODEL, dense_layers=2)),
    "mtp": run(replace(MODEL, mtp_depth=1)),
    "untied": run(replace(MODEL, tied_embedding=False)),
    "remat": run(replace(MODEL, remat="full")),
    "dots": run(replace(MODEL, remat="dots")),
    "dropout": run(replace(MODEL, dropout=0.2)),
    "accumulation": run(replace(MODEL, mtp_depth=1), optim=OptimConfig(accumulation=2)),
    "muon": run(optim=OptimConfig(optimizer="muon")),
    "capacity": moe(capacity_factor=0.6),
    "noisy": softmax(rule="noisy_top_k"),
    "expert_choice": softmax(rule="expert_choice", allow_acausal=True),
    "token_rounding": softmax(rule="token_rounding", rounding_tile=4),
    "hash": softmax(rule="hash"),
    "qk_norm": run(replace(MODEL, attention=replace(GQA, qk_norm="full"))),
    "teacher": run(distill=DistillConfig(teacher="another model", alpha=0.5, chunk=100)),
}
IN_PLACE: dict[str, TrainConfig] = {
    "in_place": run(replace(MODEL, layers=3, mtp_depth=1)),
    "in_place_remat": replace(
        run(replace(MODEL, layers=3, remat="full", dropout=0.2)),
        batch=16,
        optim=OptimConfig(accumulation=2),
    ),
}
"""Their experts are read out of the stack of all layers, as the kernels read them on a GPU."""
CASES |= IN_PLACE


def replicated(kind: Any = "all_to_all", **settings: Any) -> ExchangeConfig:
    """12 slots of 8 experts."""
    return ExchangeConfig(kind, rebalance=1, replicas=4, **settings)


LAYOUTS: dict[str, ParallelConfig] = {
    "data": ParallelConfig(),
    "fsdp": ParallelConfig(fsdp=8),
    "expert": ParallelConfig(expert=8),
    "tensor": ParallelConfig(tensor=2),
    "fsdp-expert": ParallelConfig(fsdp=2, expert=4),
    "fsdp-tensor": ParallelConfig(fsdp=4, tensor=2),
    "expert-tensor": ParallelConfig(expert=4, tensor=2),
    "three": ParallelConfig(fsdp=2, expert=2, tensor=2),
    "weights": ParallelConfig(fsdp=2, expert=4, exchange=ExchangeConfig("weights")),
    "all_gather": ParallelConfig(expert=4, tensor=2, exchange=ExchangeConfig("all_gather")),
    "data-chunks": ParallelConfig(expert=4, exchange=ExchangeConfig(chunks=2)),
    "data-overflow": ParallelConfig(expert=4, exchange=ExchangeConfig(buffer=0.2)),
    "chunks": ParallelConfig(fsdp=2, expert=4, exchange=ExchangeConfig(chunks=2)),
    "ring": ParallelConfig(fsdp=2, expert=4, exchange=ExchangeConfig("ring")),
    "copies": ParallelConfig(expert=4, tensor=2, exchange=ExchangeConfig("copies", node=2)),
    "overflow": ParallelConfig(fsdp=2, expert=4, exchange=ExchangeConfig(buffer=0.2)),
    "replicas": ParallelConfig(fsdp=2, expert=4, exchange=replicated()),
    "replicas-three": ParallelConfig(fsdp=2, expert=2, tensor=2, exchange=replicated(chunks=2)),
    "replicas-all_gather": ParallelConfig(expert=4, tensor=2, exchange=replicated("all_gather")),
    "replicas-ring": ParallelConfig(expert=4, tensor=2, exchange=replicated("ring")),
    "replicas-copies": ParallelConfig(fsdp=2, expert=4, exchange=replicated("copies", node=2)),
    "replicas-overflow": ParallelConfig(fsdp=2, expert=4, exchange=replicated(buffer=0.2)),
}
"""Those without the tensor axis split a batch into eight parts, the others into four."""


def in_float64(config: TrainConfig) -> TrainConfig:
    """No setting offers float64."""
    model = replace(config.model)
    object.__setattr__(model, "param_dtype", "float64")
    object.__setattr__(model, "compute_dtype", "float64")
    return replace(config, model=model)


def make_batch(config: TrainConfig) -> dict[str, jax.Array]:
    """Documents of uneven lengths, a row that is half padding, and an empty one."""
    rng = np.random.default_rng(0)
    shape = (config.batch, config.data.length + 1 + config.model.mtp_depth)
    often = np.linspace(0.02, 0.5, config.batch)[:, None]
    segments = 1 + np.cumsum(rng.random(shape) < often, axis=1)
    segments[-1] = 0
    segments[-2, 7:] = 0
    tokens = rng.integers(0, VOCABULARY, shape)
    return {
        name: jnp.asarray(a, jnp.int32) for name, a in (("tokens", tokens), ("segments", segments))
    }


@cache
def start(name: str) -> tuple[TrainState, dict[str, jax.Array], tuple[Any, ...]]:
    """The state with a router bias that matters, a batch, and the objective's operands."""
    config = in_float64(CASES[name])
    state = jax.jit(lambda: init_state(config))()
    bias = jax.tree.map(lambda b: 0.1 * jax.random.normal(jax.random.key(1), b.shape), state.router)
    operands: tuple[Any, ...] = ()
    if config.distill.teacher:
        other = jax.jit(lambda: init_state(replace(config, seed=1)))()
        operands = ([other.model_states()],)
    return state._replace(router=bias), make_batch(config), operands


def update(name: str, slots: Any = None) -> Any:
    """(state, batch, *operands) -> everything that an update computes."""
    config = in_float64(CASES[name])
    objective = next_token
    if config.distill.teacher:
        objective = online_objective(config.distill, [config.model])
    merge = None if slots is None else partial(merge_with_slots, config.model, slots)
    gradient = make_gradient(config, objective, merge)
    apply = make_update(config)

    def everything(state: TrainState, batch: Any, *operands: Any) -> Any:
        key = state.step_key()
        (total, parts), gradients = gradient(state.parameters, state.router, batch, key, *operands)
        whole = Gradient(gradients, optax.tree.norm(gradients), parts)
        after = apply(state, whole)
        return but_waited((total, parts, gradients, after.state.router, after.metrics))

    return everything


def but_waited(tree: Any) -> Any:
    """How many copies waited, and how many a device computes, depends on the layout.

    Nothing else does.
    """

    def is_stats(node: Any) -> bool:
        return isinstance(node, RouterStats)

    return jax.tree.map(
        lambda node: node._replace(waited=None, busiest=None) if is_stats(node) else node,
        tree,
        is_leaf=is_stats,
    )


@cache
def alone(name: str) -> Any:
    """The results on one device."""
    state, batch, operands = start(name)
    return jax.device_get(jax.jit(update(name))(state, batch, *operands))


def spread(name: str, layout: ParallelConfig) -> list[Any]:
    """The results on a mesh: of an update, or of one on each of several placements of experts."""
    mesh = make_mesh(layout)
    whole = not layout.exchange.rebalance
    in_place = reading_in_place() if name in IN_PLACE else nullcontext()
    with jax.set_mesh(mesh), exchanging(layout.exchange), in_place as read:
        state, _, operands = start(name)
        trees = (state, operands)
        placed = [jax.device_put(tree, shardings(mesh, tree, whole)) for tree in trees]
        batch = jax.device_put(start(name)[1], batch_sharding(mesh))
        if whole:
            results = [jax.device_get(jax.jit(update(name))(placed[0], batch, *placed[1]))]
        else:
            results = on_placements(name, layout, (placed[0], batch, *placed[1]))
    if name in IN_PLACE:
        # Matrices as small as these are not split over fsdp, so that they are read in place too.
        assert bool(read) == whole, read
    return results


def on_placements(name: str, layout: ParallelConfig, arguments: Any) -> list[Any]:
    """The results before any load is known, after a rebalance, and with replicas of one expert."""
    model = CASES[name].model
    planner = SlotPlanner.of(model.moe, layout)
    layers = {"sparse": model.moe_layers, "mtp": model.mtp_depth}

    @jax.jit
    def on(slots: Any, *arguments: Any) -> Any:
        return update(name, slots)(*arguments)

    slots = {part: planner.first(number) for part, number in layers.items() if number}
    results = []
    for _ in range(2):
        results.append(jax.device_get(on(slots, *arguments)))
        loads = {part: stats.load for part, stats in results[-1][-1].stats.items()}
        slots = {part: planner.next(loads[part], own) for part, own in slots.items()}
    one_hot = np.arange(planner.experts) == 5
    slots = {p: planner.next(np.tile(one_hot, (len(s), 1)), s) for p, s in slots.items()}
    results.append(jax.device_get(on(slots, *arguments)))
    assert on._cache_size() == 1  # a new placement compiles nothing
    return results


def difference(one: Any, other: Any) -> float:
    """The largest difference of any array, relative to the array's largest value."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a = np.asarray(a, np.float64)
        worst = max(worst, float(np.max(np.abs(a - b)) / max(np.max(np.abs(a)), 1e-12)))
    return worst


def main(pairs: list[str]) -> None:
    # The code asks for float32 by this name wherever it must not round to less.
    jnp.float32 = jnp.float64
    for pair in pairs:
        name, layout = pair.split("/")
        results = spread(name, LAYOUTS[layout])
        found = max(difference(alone(name), result) for result in results)
        print(f"{pair} {found:.3g}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
