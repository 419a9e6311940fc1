"""reference, blockwise and cudnn against a loop over positions, and against each other."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.base.errors import UserError
from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.model.attention import AttentionMask, attend, check_attention
from moe_jax.model.attention import blockwise as by_blocks
from moe_jax.model.attention import cudnn as by_cudnn
from moe_jax.model.attention import reference as by_formula
from moe_jax.model.attention.api import LONG, choose
from moe_jax.model.stages import REMAT_POLICIES
from tests import oracle

IMPLEMENTATIONS = {
    "reference": by_formula.attend,
    "one block": by_blocks.attend,
    "blocks": partial(by_blocks.attend, block=8),
}
SHAPES = {  # H, N, A, C
    "multi-head": (2, 2, 8, 8),
    "grouped": (6, 2, 8, 8),
    "multi-query": (3, 1, 4, 4),
    "latent": (2, 2, 12, 8),
}
DOCUMENTS = {
    "one document": np.ones(21, int),  # no multiple of a block
    "documents": np.repeat([1, 2, 3, 4], [3, 9, 5, 4]),
    "documents of one token": np.arange(16),
    "padding at the end": np.repeat([1, 2, 0], [7, 5, 6]),
    "one token": np.ones(1, int),
}


def causal(segments: np.ndarray) -> AttentionMask:
    return AttentionMask(None, jnp.asarray(segments), jnp.asarray(segments))


def inputs(shape, batch: int, length: int, seed: int = 0, dtype=jnp.float32):
    """query, key, value and the gradient of the output."""
    heads, kv_heads, width, value_width = shape
    rng = np.random.default_rng(seed)
    sizes = [(heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)]
    return [jnp.asarray(rng.normal(size=(batch, length, *size)), dtype) for size in sizes]


def output_and_gradients(function, query, key, value, d_out, mask):
    @jax.jit
    def run(query, key, value, d_out, mask):
        out, pullback = jax.vjp(lambda *parts: function(*parts, mask), query, key, value)
        return out, *pullback(d_out)

    return [np.asarray(a, np.float64) for a in run(query, key, value, d_out, mask)]


def by_hand(query, key, value, d_out, segments):
    """The oracle's output and gradients of a batch, in float64."""
    parts = [np.asarray(a, np.float64) for a in (query, key, value, d_out)]
    rows = [
        (oracle.attention(*row[:3], s), *oracle.attention_gradients(*row, s))
        for *row, s in zip(*parts, segments, strict=True)
    ]
    return [np.stack(group) for group in zip(*rows, strict=True)]


def assert_all_close(found, expected, **tolerance):
    for name, a, b in zip(("output", "query", "key", "value"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, err_msg=name, **tolerance)


@pytest.fixture
def cudnn_on_cpu(monkeypatch):
    """cudnn's arguments (masks, padding, widths), computed by jax.nn's plain XLA path."""
    through_xla = jax.nn.dot_product_attention

    def dot_product_attention(*arrays, implementation, **settings):
        assert implementation == "cudnn"
        return through_xla(*arrays, implementation="xla", **settings)

    monkeypatch.setattr(by_cudnn, "compute_capability", lambda: 9.0)
    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)


def test_the_oracles_gradients_are_finite_differences():
    query, key, value, d_out = (np.asarray(a[0], np.float64) for a in inputs((2, 1, 4, 3), 1, 6))
    segments = np.array([1, 1, 1, 2, 2, 2])
    rng = np.random.default_rng(1)
    step = [1e-5 * rng.normal(size=a.shape) for a in (query, key, value)]
    ends = [
        (oracle.attention(query + s * step[0], key + s * step[1], value + s * step[2], segments))
        for s in (1, -1)
    ]
    gradients = oracle.attention_gradients(query, key, value, d_out, segments)
    slope = sum((g * s).sum() for g, s in zip(gradients, step, strict=True))
    # Central differences are exact to the square of the step.
    np.testing.assert_allclose(slope, ((ends[0] - ends[1]) * d_out).sum() / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "documents"),
    [(shape, "documents") for shape in SHAPES] + [("grouped", name) for name in DOCUMENTS],
)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equals_the_loop_over_positions_with_gradients(name, shape, documents):
    own = DOCUMENTS[documents]
    segments = np.stack([own, np.full_like(own, 5)])  # each sequence has documents of its own
    arrays = inputs(SHAPES[shape], 2, len(own))
    found = output_and_gradients(IMPLEMENTATIONS[name], *arrays, causal(segments))
    # float32 against float64
    assert_all_close(found, by_hand(*arrays, segments), rtol=1e-4, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 3),
    widths=st.tuples(*[st.integers(1, 9)] * 2),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    block=st.integers(1, 40),
)
def test_blocks_of_any_size_equal_the_loop(sizes, widths, lengths, block):
    batch, kv_heads, group = sizes
    own = np.repeat(np.arange(len(lengths)), lengths)
    segments = np.stack([own] * batch)
    arrays = inputs((kv_heads * group, kv_heads, *widths), batch, len(own))
    function = partial(by_blocks.attend, block=block)
    found = output_and_gradients(function, *arrays, causal(segments))
    # float32 against float64
    assert_all_close(found, by_hand(*arrays, segments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["grouped", "latent"])
@pytest.mark.parametrize("name", ["reference", "blocks", "cudnn"])
def test_bfloat16(name, shape, cudnn_on_cpu):
    segments = DOCUMENTS["documents"][None]
    if shape == "latent":
        arrays = inputs((2, 2, 16, 8), 1, 21, dtype=jnp.bfloat16)
    else:
        arrays = inputs(SHAPES[shape], 1, 21, dtype=jnp.bfloat16)
    function = {**IMPLEMENTATIONS, "cudnn": by_cudnn.attend}[name]
    found = output_and_gradients(function, *arrays, causal(segments))
    # Queries, weights and outputs are each rounded to 8 bits (2^-9 = 0.002 relative), before sums
    # of up to 9 tokens and 3 heads whose terms have size 1 to 3.
    assert_all_close(found, by_hand(*arrays, segments), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", ["reference", "blocks"])
@pytest.mark.parametrize(("start", "length"), [(0, 12), (5, 1), (16, 12)])
def test_queries_of_a_cache_see_every_earlier_slot(name, start, length):
    query, _, _, _ = inputs(SHAPES["grouped"], 2, length)
    _, key, value, _ = inputs(SHAPES["grouped"], 2, 30, seed=1)
    ones = jnp.ones((1, 30), jnp.int32)

    @jax.jit
    def run(start):
        mask = AttentionMask(start, ones[:, :length], ones)
        return IMPLEMENTATIONS[name](query, key, value, mask)

    # The oracle has a query for every key: those of earlier slots are not looked at.
    for row, out in enumerate(run(jnp.asarray(start))):
        padded = np.zeros((30, *query.shape[2:]))
        padded[start : start + length] = query[row]
        expected = oracle.attention(padded, key[row], value[row], np.ones(30))
        # float32 against float64
        np.testing.assert_allclose(out, expected[start : start + length], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "blocks", "cudnn"])
def test_no_gradient_crosses_documents_or_comes_from_the_future(name, cudnn_on_cpu):
    segments = DOCUMENTS["documents"]
    dtype = jnp.bfloat16 if name == "cudnn" else jnp.float32
    query, key, value, _ = inputs((2, 1, 8, 8), 1, 21, dtype=dtype)
    function = {**IMPLEMENTATIONS, "cudnn": by_cudnn.attend}[name]

    def outputs(key, value):
        return function(query, key, value, causal(segments[None]))[0].sum(axis=(1, 2))

    same = segments[:, None] == segments[None, :]
    visible = same & np.tril(np.ones((21, 21), bool))
    d_key, d_value = (
        np.abs(np.asarray(jacobian, np.float32)[:, 0]).sum(axis=(-1, -2))
        for jacobian in jax.jit(jax.jacobian(outputs, argnums=(0, 1)))(key, value)
    )
    np.testing.assert_array_equal(d_value > 0, visible)
    assert not d_key[~visible].any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_gives_no_nan(name):
    """It cannot come from document_context or cached_context, where a token sees itself."""
    arrays = inputs(SHAPES["grouped"], 1, 21)
    mask = AttentionMask(None, jnp.full((1, 21), 2).at[0, 3:].set(1), jnp.ones((1, 21), int))
    found = output_and_gradients(IMPLEMENTATIONS[name], *arrays, mask)
    assert all(np.isfinite(a).all() for a in found)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_gradients_are_the_same_when_rematerialised(remat):
    *arrays, d_out = inputs(SHAPES["grouped"], 2, 21)
    mask = causal(np.stack([DOCUMENTS["documents"]] * 2))
    function = IMPLEMENTATIONS["blocks"]
    rematerialised = jax.checkpoint(function, policy=REMAT_POLICIES[remat])
    found = output_and_gradients(rematerialised, *arrays, d_out, mask)
    np.testing.assert_equal(found, output_and_gradients(function, *arrays, d_out, mask))


def temporaries(function, shape, length: int, dtype=jnp.float32) -> int:
    """Bytes of temporary buffers of the function and its gradients, compiled for one sequence."""
    heads, kv_heads, width, value_width = shape
    query, key, value = (
        jax.ShapeDtypeStruct((1, length, *size), dtype)
        for size in ((heads, width), (kv_heads, width), (kv_heads, value_width))
    )
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(query, key, value, segments):
        return function(query, key, value, AttentionMask(None, segments, segments)).sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    analysis = gradients.lower(query, key, value, segments).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def test_blockwise_never_holds_all_scores():
    length = 4096
    scores = 4 * 4 * length**2  # float32, 4 heads
    shape = (4, 2, 32, 32)
    assert temporaries(by_formula.attend, shape, length) > scores
    assert temporaries(by_blocks.attend, shape, length) < scores / 10


@pytest.mark.slow
def test_blockwise_fits_deepseek_v3():
    """128 heads at L = 4096: 8.6 GB of scores for each sequence and layer.

    Blockwise needs 2.7 GB, which grow with L and not with L²: blocks of queries, keys and values,
    and their gradients in float32.
    """
    scores = 4 * 128 * 4096**2
    shape = (128, 128, 192, 128)
    assert temporaries(by_formula.attend, shape, 4096, jnp.bfloat16) > 2 * scores
    assert temporaries(by_blocks.attend, shape, 4096, jnp.bfloat16) < scores / 3


def model_of(implementation: str, dtype: str = "bfloat16", **attention) -> ModelConfig:
    own = AttentionConfig(implementation=implementation, **attention)  # pyright: ignore
    return replace(ModelConfig(), attention=own, compute_dtype=dtype)


def test_auto_takes_the_best_that_can_run(monkeypatch):
    def chosen(length, implementation="auto", cached=False, dtype=jnp.bfloat16):
        query, _, value, _ = inputs((2, 2, 16, 8), 1, length, dtype=dtype)
        start = jnp.asarray(0) if cached else None
        return choose(
            query, value, AttentionMask(start, *[jnp.ones((1, length))] * 2), implementation
        )

    assert [chosen(n) for n in (1, LONG - 1, LONG)] == ["reference", "reference", "blockwise"]
    assert chosen(8, "blockwise") == "blockwise"
    assert chosen(LONG, "reference") == "reference"
    monkeypatch.setattr(by_cudnn, "compute_capability", lambda: 8.0)
    assert chosen(8) == "cudnn"
    assert chosen(7) == "reference"  # odd: cuDNN's backward pass would refuse it
    assert chosen(8, dtype=jnp.float32) == "reference"
    assert chosen(8, "cudnn", cached=True) == "reference"
    assert chosen(LONG, "cudnn", cached=True) == "blockwise"


def test_cudnn_that_cannot_run_is_refused_in_one_line(monkeypatch):
    arrays = inputs((2, 2, 8, 8), 1, 4, dtype=jnp.bfloat16)[:3]
    mask = causal(np.ones((1, 4), int))
    for run in (
        lambda: check_attention(model_of("cudnn"), 4),
        lambda: attend(*arrays, mask, "cudnn"),
    ):
        with pytest.raises(UserError, match="cudnn cannot run: the devices are cpu, not NVIDIA"):
            run()
    check_attention(model_of("auto"), 4)
    check_attention(model_of("blockwise", "float32"), 3)

    latent = {"kind": "mla", "nope_dim": 128, "rope_dim": 64, "v_dim": 128}
    refused = [
        (7.5, model_of("cudnn"), 4, "compute capability 7.5, below 8.0"),
        (8.0, model_of("cudnn", "float32"), 4, "compute_dtype is float32"),
        (8.0, model_of("cudnn", head_dim=20), 4, "multiples of 8 up to 128 wide .* are 20 wide"),
        (8.0, model_of("cudnn", **latent), 4, "up to 128 wide .* are 192 wide"),
        (9.0, model_of("cudnn", **{**latent, "v_dim": 200}), 4, r"values \(200 wide\)"),
        (9.0, model_of("cudnn"), 5, "even length, and data.length is 5"),
    ]
    for capability, model, length, message in refused:
        monkeypatch.setattr(by_cudnn, "compute_capability", lambda own=capability: own)
        with pytest.raises(UserError, match=message) as raised:
            check_attention(model, length)
        assert "\n" not in str(raised.value)
    monkeypatch.setattr(by_cudnn, "compute_capability", lambda: 9.0)
    check_attention(model_of("cudnn", **latent), 4)


def test_cudnn_lowers_for_a_gpu_that_is_absent(monkeypatch):
    """jax asks the library for its version even when it only lowers: the test answers for it."""
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(by_cudnn, "compute_capability", lambda: 9.0)
    arrays = inputs((4, 2, 64, 48), 2, 16, dtype=jnp.bfloat16)[:3]
    segments = np.ones((2, 16), int)

    def loss(*arrays):
        return attend(*arrays, causal(segments), "cudnn").astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4, 2, 64, 64), (2, 2, 96, 64)], ids=["grouped", "latent"])
def test_cudnn_equals_the_reference_on_a_gpu(shape):
    arrays = inputs(shape, 2, 64, dtype=jnp.bfloat16)
    segments = np.repeat([[1, 2, 3]], [20, 1, 43], axis=1).repeat(2, axis=0)
    found = output_and_gradients(by_cudnn.attend, *arrays, causal(segments))
    expected = output_and_gradients(by_formula.attend, *arrays, causal(segments))
    # Both round weights and outputs to bfloat16 (2^-9), at different places.
    assert_all_close(found, expected, rtol=0.05, atol=0.05)
