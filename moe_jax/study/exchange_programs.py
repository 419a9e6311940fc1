"""A layer over many devices, and an update with such layers, compiled for absent H100s."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_kernels.experts import Source, mixture
from moe_kernels.launch import lowering_for

from moe_jax.config import DataConfig, ParallelConfig, TrainConfig
from moe_jax.config.exchange import ExchangeConfig
from moe_jax.config.presets import PRESETS
from moe_jax.moe.expert_parallel import Experts, Sharding, expert_parallel
from moe_jax.moe.hops import Assigned
from moe_jax.moe.lanes import Matrices
from moe_jax.moe.module import MoE
from moe_jax.objectives.next_token import next_token
from moe_jax.parallel.exchange import exchanging
from moe_jax.predict.absent import OPTIONS, absent_devices
from moe_jax.predict.copies import copied_in_loops
from moe_jax.predict.hardware import find_card
from moe_jax.predict.scheduled_hlo import Rates, Timeline, timeline
from moe_jax.train.engines.dense import DenseEngine

NODE = 8
"""H100s of a machine."""


@dataclass(frozen=True)
class Sizes:
    """Those of DeepSeek-V3's layer."""

    width: int = 7168
    """Model width (D)."""
    hidden: int = 2048
    """Expert hidden width (F)."""
    experts: int = 256
    """Experts (E)."""
    per_token: int = 8
    """Experts of a token (K)."""
    tokens: int = 4096
    """Tokens of a device."""
    layers: int = 3
    """Layers of the scanned model."""
    step_layers: int = 2
    """Layers of the model whose whole update is compiled."""


@dataclass(frozen=True)
class Case:
    """One program."""

    exchange: ExchangeConfig
    backward: bool = False
    """Forward and backward pass. The cotangent depends on the output."""
    scanned: bool = False
    """Layers with residuals in a scan, each computed again in the backward pass."""
    nodes: int = 1
    step: bool = False
    """The whole update of a model, as the dense engine compiles it."""
    sliced: bool = False
    """Of an update: each turn of the scan slices its layer's matrices out of the stack."""


def compiled(sizes: Sizes, case: Case) -> Any:
    """The program of a case, compiled for absent H100s."""
    if case.step:
        return _compiled_step(sizes, case)
    devices = NODE * case.nodes
    cards = np.array(absent_devices(find_card("h100"), devices))
    mesh = Mesh(cards, ("expert",), axis_types=(AxisType.Auto,))
    sharding = Sharding("expert", devices, case.exchange, mixture, True, in_place=True)
    layers = (sizes.layers,) if case.scanned else ()
    split = P(*(None for _ in layers), "expert")
    layer = partial(_stack if case.scanned else _layer, sharding)
    function = jax.shard_map(
        layer, mesh=mesh, in_specs=(P("expert"), split, split), out_specs=P("expert")
    )

    # Any: these stand for arrays.
    def array(*shape: int, dtype: Any = jnp.bfloat16, spec: P = split) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = devices * sizes.tokens
    d = sizes.width
    x = array(rows, d, spec=P("expert"))
    chosen = (*layers, rows, sizes.per_token)
    assigned = Assigned(array(*chosen, dtype=jnp.int32), array(*chosen, dtype=jnp.float32))
    e = sizes.experts
    f = sizes.hidden
    matrices = Matrices(array(*layers, e, d, 2 * f), array(*layers, e, f, d))
    with jax.set_mesh(mesh), lowering_for(90):
        called = jax.jit(partial(_gradient, function) if case.backward else function)
        return called.lower(x, assigned, matrices).compile(compiler_options=dict(OPTIONS))


def _compiled_step(sizes: Sizes, case: Case) -> Any:
    """The update of DeepSeek-V3 with few layers and no multi-token prediction, a sequence a device.

    Layers are computed again in the backward pass.
    """
    published = PRESETS["deepseek_v3"].model
    experts = {"experts": sizes.experts, "experts_per_token": sizes.per_token}
    model = replace(
        published,
        width=sizes.width,
        layers=sizes.step_layers,
        dense_layers=0,
        mtp_depth=0,
        remat="full",
        compute_dtype="bfloat16",
        moe=replace(published.moe, expert_hidden=sizes.hidden, **experts),
    )
    config = TrainConfig(
        batch=NODE,
        model=model,
        data=DataConfig(length=sizes.tokens),
        parallel=ParallelConfig(expert=NODE, exchange=case.exchange),
    )
    with lowering_for(90):
        engine = DenseEngine(config, absent_devices(find_card("h100"), NODE))
        engine.check()
        with jax.set_mesh(engine.mesh), exchanging(case.exchange):
            # The control: without a stack to read, every layer reads its own slice.
            read = MoE.stack if not case.sliced else lambda self, dtype: None
            with patch.object(MoE, "stack", read):
                lowered = engine.lower(engine.abstract_batch(), next_token)
            return lowered.compile(compiler_options=dict(OPTIONS))


def _layer(sharding: Sharding, x: Array, assigned: Assigned, matrices: Matrices) -> Array:
    return expert_parallel(x, assigned, Experts(matrices), sharding)[0]


def _stack(sharding: Sharding, x: Array, assigned: Assigned, stack: Matrices) -> Array:
    """Layers with residuals. The kernels read the matrices of the stack, which stay where they lie.

    The scan's own slices of them only receive the gradients.
    """
    own = stack.down.shape[1]
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stack)
    whole = jax.lax.stop_gradient(flat)

    @jax.checkpoint
    def body(x: Array, layer: tuple[Array, Assigned, Matrices]) -> tuple[Array, None]:
        index, assigned, matrices = layer
        experts = Experts(matrices, Source(whole.gate_up, whole.down, index * own))
        return x + expert_parallel(x, assigned, experts, sharding)[0], None

    index = jnp.arange(len(stack.down))
    return jax.lax.scan(body, x, (index, assigned, stack))[0]


def _gradient(function: Any, x: Array, assigned: Assigned, matrices: Matrices) -> Any:
    def loss(x: Array, weights: Array, matrices: Matrices) -> Array:
        out = function(x, assigned._replace(weights=weights), matrices).astype(jnp.float32)
        return jnp.sum(out * out) / 2

    return jax.grad(loss, argnums=(0, 1, 2))(x, assigned.weights, matrices)


@dataclass(frozen=True)
class Reading:
    """The prediction for one program."""

    line: Timeline
    covered: float
    """Share of the transfers' time that lies under products."""
    exchange: float
    """The same of the all-to-alls alone."""
    memory: int
    """Temporary bytes of a device."""
    copied: int
    """Bytes of experts' matrices that loops copy."""


def read(sizes: Sizes, case: Case) -> Reading:
    """Compiles and prices a program."""
    done = compiled(sizes, case)
    text = done.as_text()
    under = timeline(text, Rates(), products_alone=True)
    matrices = {(sizes.width, 2 * sizes.hidden), (sizes.hidden, sizes.width)}
    return Reading(
        timeline(text, Rates()),
        under.covered,
        under.of("all-to-all").covered,
        done.memory_analysis().temp_size_in_bytes,
        copied_in_loops(text, matrices),
    )
