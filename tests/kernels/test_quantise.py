"""The FP8 quantisers: E4M3's grid, scales of tiles, and the kernels' bits."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from moe_kernels.quantise import quantise_matrices, quantise_rows, reference

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def on_grid(x):
    """E4M3 by another hand: ml_dtypes' conversion, saturated before."""
    clipped = np.clip(np.asarray(x, np.float32), -448, 448)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def critical_numbers():
    """Every number of the grid, every tie between two, what lies beside them, and some others."""
    grid = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (grid[1:] + grid[:-1]) / 2
    exact = np.concatenate([grid, ties, [464, 1e30, 0, 1e-30]]).astype(np.float32)
    beside = [np.nextafter(exact, np.float32(to)) for to in (-1, 1e38)]
    random = np.random.default_rng(0).uniform(0, 450, 500) * np.logspace(-6, 0, 500)
    positive = np.concatenate([exact, *beside, random]).astype(np.float32)
    return np.concatenate([positive, -positive])


def heavy_tailed(shape, dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    rows = random.choice([1.0, 1e-3, 1e3], size=(*shape[:-1], 1))
    return jnp.asarray(random.standard_t(2, size=shape) * rows, jnp.float32).astype(dtype)


def assert_same_bits(actual, expected):
    for name, one, two in zip(actual._fields, actual, expected, strict=True):
        assert (one.dtype, one.shape) == (two.dtype, two.shape), name
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes(), name


def dequantised(rows):
    scales = np.repeat(np.asarray(rows.scales), reference.TILE, axis=1)
    return np.asarray(rows.values, np.float32) * scales[:, : rows.values.shape[1]]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rounding_to_the_grid(wrap):
    numbers = critical_numbers()
    np.testing.assert_array_equal(wrap(reference.round_e4m3)(numbers), on_grid(numbers))
    assert np.isnan(wrap(reference.round_e4m3)(jnp.float32(np.nan)))


def test_the_kernel_rounds_critical_numbers_in_the_same_way():
    # A row of 448 and 127 numbers up to 448 has the scale 1.
    numbers = critical_numbers()
    numbers = np.resize(numbers[np.abs(numbers) <= 448], (20, 127))
    x = jnp.asarray(np.concatenate([np.full((20, 1), 448, np.float32), numbers], axis=1))
    actual = quantise_rows(x, implementation="triton")
    np.testing.assert_allclose(actual.scales, 1, rtol=1e-7)
    np.testing.assert_array_equal(np.asarray(actual.values, np.float32), on_grid(x))


CASES = list(
    itertools.product(
        (jnp.float32, jnp.bfloat16, jnp.float16), (False, True), ((37, 300), (1, 7), (128, 128))
    )
)


@pytest.mark.parametrize(("dtype", "power_of_two", "shape"), CASES)
def test_rows_by_kernel_and_reference_are_the_same_bits(dtype, power_of_two, shape):
    x = heavy_tailed(shape, dtype).at[0, 3].set(jnp.nan).at[0, 5].set(-jnp.inf)
    expected = jax.jit(partial(reference.quantise_rows, power_of_two=power_of_two))(x)
    assert_same_bits(quantise_rows(x, power_of_two, "triton"), expected)


@pytest.mark.parametrize(
    ("shape", "parts"), [((3, 200, 144), 2), ((2, 128, 256), 1), ((1, 1, 1), 1)]
)
def test_matrices_by_kernel_and_reference_are_the_same_bits(shape, parts):
    for dtype, power_of_two in ((jnp.float32, False), (jnp.bfloat16, True)):
        w = heavy_tailed(shape, dtype)
        expected = jax.jit(lambda w: reference.quantise_matrices(w, parts, power_of_two))(w)  # noqa: B023
        assert_same_bits(quantise_matrices(w, parts, power_of_two, "triton"), expected)


def test_matrices_are_transposed_and_each_part_has_its_own_blocks():
    w = np.random.default_rng(0).normal(size=(2, 130, 2 * 200)).astype(np.float32)
    actual = quantise_matrices(jnp.asarray(w), parts=2)
    assert actual.values.shape == (2, 400, 130)
    assert actual.scales.shape == (2, 2, 2, 2)
    for e, part, i, j in np.ndindex(actual.scales.shape):
        # The columns 128 i … of a part, which begins at column 200 · part.
        columns = slice(200 * part + 128 * i, 200 * part + min(200, 128 * i + 128))
        block = w[e, 128 * j : 128 * j + 128, columns]
        scale = np.asarray(actual.scales)[e, part, i, j]
        assert scale == pytest.approx(np.abs(block).max() / 448, rel=1e-6)
        values = np.asarray(actual.values, np.float32)[e, columns, 128 * j : 128 * j + 128]
        np.testing.assert_allclose(values.T * scale, block, rtol=1 / 16, atol=scale * 2**-10)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_scales(power_of_two):
    x = heavy_tailed((40, 260))
    actual = quantise_rows(x, power_of_two)
    most = np.abs(np.pad(x, ((0, 0), (0, 124)))).reshape(40, 3, 128).max(axis=-1) / 448
    most = np.maximum(most, 1e-4 / 448)
    scales = np.asarray(actual.scales)
    if power_of_two:
        assert np.all(np.frexp(scales)[0] == 0.5)
        assert np.all((scales >= most * (1 - 1e-6)) & (scales < 2 * most))
    else:
        np.testing.assert_allclose(scales, most, rtol=1e-6)
    # Half a step of the grid: 1/16 of the number, or of 2^-9 scales below the normal numbers.
    spread = np.repeat(scales, 128, axis=1)[:, :260]
    error = np.abs(dequantised(actual) - np.asarray(x))
    assert np.all(error <= np.maximum(np.abs(x) / 16, spread * 2**-10) * (1 + 1e-6))
    np.testing.assert_array_equal(reference.round_rows(x, power_of_two), dequantised(actual))


def test_zeros_stay_zeros_and_tiny_numbers_do_not_divide_by_zero():
    x = jnp.zeros((3, 130)).at[1, 0].set(1e-30).at[2].set(1e-4)
    actual = quantise_rows(x, implementation="triton")
    np.testing.assert_allclose(actual.scales, np.float32(1e-4) / 448, rtol=1e-6)
    assert not np.any(dequantised(actual)[:2])
    np.testing.assert_allclose(dequantised(actual)[2], 1e-4, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_what_is_not_finite_becomes_nan_alone(implementation):
    x = heavy_tailed((4, 200)).at[1, 7].set(jnp.nan).at[2, 130].set(jnp.inf).at[2, 5].set(-jnp.inf)
    actual = quantise_rows(x, implementation=implementation)
    np.testing.assert_array_equal(np.isnan(dequantised(actual)), ~np.isfinite(x))
    assert np.isfinite(actual.scales).all()
    without = quantise_rows(jnp.where(jnp.isfinite(x), x, 0), implementation=implementation)
    np.testing.assert_array_equal(actual.scales, without.scales)


def test_nothing_to_quantise():
    actual = quantise_rows(jnp.zeros((0, 200)), implementation="triton")
    assert (actual.values.shape, actual.scales.shape) == ((0, 200), (0, 2))


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match=r"x \[R, D\] must have 2 dimensions.*int32\[3, 4\]"):
        quantise_rows(jnp.zeros((3, 4), jnp.int32))
    with pytest.raises(ValueError, match="129 columns, which are not 2 equal parts"):
        quantise_matrices(jnp.zeros((1, 4, 129)), parts=2)


def test_by_name_it_refuses_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="FP8 kernels cannot run: the devices are cpu"):
        quantise_rows(jnp.zeros((2, 2)), implementation="triton")
    assert quantise_rows(jnp.zeros((2, 2))).values.shape == (2, 2), "auto takes the reference"
