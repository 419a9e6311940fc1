"""The launches that are audited: the kernels' own API, traced at the sizes of real models."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct

from moe_kernels import experts, experts_fp8
from moe_kernels.audit.compile import compile_launch
from moe_kernels.audit.describe import describe
from moe_kernels.experts.shapes import BLOCK_ROWS, OPERATIONS, Tiles, tiles, using
from moe_kernels.experts_async import launches as async_products
from moe_kernels.experts_async.shapes import BLOCK_ROWS as ASYNC_ROWS
from moe_kernels.experts_async.shapes import COOPERATIVE
from moe_kernels.gate import GateConfig, gate
from moe_kernels.launch import ASYNC_CAPABILITIES, Launch, Tuning, fp8_support, recording
from moe_kernels.schedule import schedule, schedule_shape

# T, then D, F, E and K of OLMoE-1B-7B.
TOKENS = 4096
WIDTH = 2048
HIDDEN = 1024
EXPERTS = 64
PER_TOKEN = 8


class Variant(NamedTuple):
    """A change to the table's entries, as the benchmark and the ladder of kernels measure it."""

    operations: tuple[str, ...]
    change: dict[str, Any]


VARIANTS = {
    "persistent": Variant(("up", "rows"), {"resident": 1}),
    "keep": Variant(OPERATIONS, {"keep_rows": "evict_first", "keep_matrix": "evict_last"}),
    "fast_silu": Variant(("up",), {"fast_silu": True}),
    "stream": Variant(("combine",), {"keep_rows": "evict_first", "store": ".cs"}),
    "wide": Variant(("combine",), {"tuning": Tuning(4, 2)}),
}


class Router(NamedTuple):
    """A model's experts and gate."""

    experts: int
    gate: GateConfig


ROUTERS = {
    "DeepSeek-V3": Router(
        256,
        GateConfig(8, "sigmoid", scale=2.5, groups=8, groups_per_token=4, representatives=2),
    ),
    "Kimi-K2": Router(384, GateConfig(8, "sigmoid", scale=2.827)),
    "Qwen3": Router(128, GateConfig(8, "softmax")),
    "OLMoE": Router(64, GateConfig(8, "softmax", normalise=False)),
    "Qwen1.5-MoE": Router(60, GateConfig(4, "softmax", normalise=False)),
    "512 experts, top 16": Router(512, GateConfig(16, "softmax")),
}


class RoutingCase(NamedTuple):
    """The launches of a model's gate and schedule for one architecture."""

    model: str
    arch: int


class ExpertsCase(NamedTuple):
    """The launches of the experts at one dtype and block size for one architecture."""

    dtype: str
    block_rows: int
    arch: int
    variant: str | None = None


class AsyncCase(NamedTuple):
    """The asynchronous products at one block size for one architecture, in bfloat16."""

    block_rows: int
    arch: int
    cooperative: bool = False


Case = RoutingCase | ExpertsCase | AsyncCase


def all_cases(
    architectures: Sequence[int], dtypes: Sequence[str], block_rows: Sequence[int]
) -> list[Case]:
    """Routers, the experts, variants in bfloat16 on the largest blocks, asynchronous products."""
    cases: list[Case] = [RoutingCase(model, arch) for model in ROUTERS for arch in architectures]
    cases += [
        ExpertsCase(dtype, rows, arch)
        for dtype in dtypes
        for rows in block_rows
        for arch in architectures
    ]
    cases += [
        ExpertsCase("bfloat16", BLOCK_ROWS[-1], arch, variant)
        for arch in architectures
        for variant in VARIANTS
    ]
    cases += [
        AsyncCase(rows, arch)
        for rows in ASYNC_ROWS
        for arch in architectures
        if arch in ASYNC_CAPABILITIES
    ]
    cases += [
        AsyncCase(BLOCK_ROWS[-1], arch, cooperative=True)
        for arch in architectures
        if arch in ASYNC_CAPABILITIES
    ]
    return cases


def audit_case(case: Case) -> list[dict[str, Any]]:
    """The rows of one case."""
    match case:
        case RoutingCase():
            launches = routing_launches(case)
        case ExpertsCase():
            launches = experts_launches(case)
        case AsyncCase():
            launches = async_launches(case)
    return [compile_launch(launch, case.arch) for launch in launches]


def routing_launches(case: RoutingCase) -> list[Launch]:
    """The launches of a gate and of its schedule."""
    router = ROUTERS[case.model]
    logits = ShapeDtypeStruct((TOKENS, router.experts), jnp.float32)
    bias = None
    if router.gate.function == "sigmoid":
        bias = ShapeDtypeStruct((router.experts,), jnp.float32)
    chosen = ShapeDtypeStruct((TOKENS, router.gate.per_token), jnp.int32)
    jax.clear_caches()  # see experts_launches
    with recording(case.arch) as launches:
        jax.eval_shape(partial(gate, config=router.gate), logits, bias)
        jax.eval_shape(partial(schedule, num_experts=router.experts, block_rows=128), chosen)
    return launches


def experts_launches(case: ExpertsCase) -> list[Launch]:
    """The launches of a forward pass without gradients, of one with them, and of decoding.

    Each appears once. In 16 bits those with FP8 products are added where the architecture has FP8.
    Of a variant only the launches that it changes are returned.
    """
    jax.clear_caches()  # JAX does not trace a function twice, and the architecture is no argument
    with recording(case.arch) as recorded, using(variant_tiles(case)):
        arrays = _shapes(case, TOKENS)
        layers = [experts.mixture]
        if jnp.dtype(case.dtype).itemsize == 2 and fp8_support().name != "none":
            layers.append(experts_fp8.mixture)
        for mixture in layers:
            jax.eval_shape(mixture, *arrays)
            jax.eval_shape(partial(_forward_and_backward, mixture), *arrays)
        x, _, gate_up, _, plan = arrays
        jax.eval_shape(partial(experts.grouped, gathered=True), x, gate_up, plan)
        if case.block_rows == BLOCK_ROWS[0]:  # decoding has no blocks: once is enough
            jax.eval_shape(experts.mixture, *_shapes(case, tokens=1))
    launches = {describe(launch): launch for launch in recorded}
    if case.variant:
        plain = {describe(launch) for launch in experts_launches(case._replace(variant=None))}
        launches = {text: launch for text, launch in launches.items() if text not in plain}
    return list(launches.values())


def async_launches(case: AsyncCase) -> list[Launch]:
    """The asynchronous products with z and without, and the second product.

    The products are called by themselves: the API asks for a jaxlib that can launch them, and to
    compile them Triton is enough.
    """
    shapes = _shapes(ExpertsCase("bfloat16", case.block_rows, case.arch), TOKENS)
    x, _, gate_up, down, plan = shapes
    jax.clear_caches()  # see experts_launches
    with recording(case.arch) as launches, using(COOPERATIVE if case.cooperative else {}):
        for save in (False, True):
            up = partial(async_products.up_projection, save=save)
            hidden, _ = jax.eval_shape(up, x, gate_up, plan)
        jax.eval_shape(async_products.grouped_product, hidden, down, plan)
    return launches


def variant_tiles(case: ExpertsCase) -> dict[str, Tiles]:
    """The tiles of a variant's operations, none without a variant."""
    if not case.variant:
        return {}
    operations, change = VARIANTS[case.variant]
    table = {op: tiles(op, jnp.dtype(case.dtype), case.block_rows) for op in operations}
    return {op: entry._replace(**change) for op, entry in table.items()}


def _shapes(case: ExpertsCase, tokens: int) -> tuple[Any, ...]:
    """x, weights, gate_up, down and plan."""
    return (
        ShapeDtypeStruct((tokens, WIDTH), case.dtype),
        ShapeDtypeStruct((tokens, PER_TOKEN), jnp.float32),
        ShapeDtypeStruct((EXPERTS, WIDTH, 2 * HIDDEN), case.dtype),
        ShapeDtypeStruct((EXPERTS, HIDDEN, WIDTH), case.dtype),
        schedule_shape(tokens, PER_TOKEN, EXPERTS, case.block_rows),
    )


def _forward_and_backward(mixture: Callable[..., Any], *inputs: Any) -> Any:
    *arrays, plan = inputs
    out, pull = jax.vjp(partial(mixture, plan=plan), *arrays)
    return pull(out)  # any cotangent of out's shape will do
