"""The asynchronous products in this package's interpreter of Gluon, and as they compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_kernels import experts, experts_async
from moe_kernels.launch import lowering_for

from moe_jax.moe.plan import make_plan

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    jax.clear_caches()


def make_inputs(sizes, dtype, per_token=2, seed=0):
    t, d, f, e = sizes
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    chosen = np.stack([random.permutation(e)[:per_token] for _ in range(t)])
    weights = jnp.asarray(random.random(chosen.shape), jnp.float32)
    gate_up = draw(e, d, 2 * f) / d**0.5
    down = draw(e, f, d) / f**0.5
    arrays = (draw(t, d).astype(dtype), weights, gate_up.astype(dtype), down.astype(dtype))
    return jnp.asarray(chosen, jnp.int32), arrays


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_smoke(arch, dtype):
    chosen, arrays = make_inputs((150, 136, 72, 3), dtype)
    plan = make_plan(chosen, 3)
    print(plan.block_rows)
    with lowering_for(arch):
        actual = experts_async.mixture(*arrays, plan)
        expected = experts.mixture(*arrays, plan)
    np.testing.assert_allclose(np.asarray(actual, np.float32), np.asarray(expected, np.float32), atol=2e-2, rtol=2e-2)
