import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.base.errors import UserError
from moe_jax.config import ParallelConfig
from moe_jax.parallel import mesh as axes
from moe_jax.parallel.devices import ask_for_devices, require_devices
from moe_jax.parallel.mesh import make_mesh


def spread(function, *arrays):
    """The function on each device's rows, put together again, with what it saw of the mesh."""
    with jax.set_mesh(make_mesh(devices=jax.devices()[:2])):
        mapped = jax.shard_map(function, in_specs=P("data"), out_specs=P("data"))
        return jax.jit(mapped)(*arrays)


def test_the_axes_fill_the_devices():
    one = make_mesh(devices=jax.devices()[:1])
    assert dict(one.shape) == {"pipe": 1, "data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    two = make_mesh(ParallelConfig(fsdp=2))
    assert (two.shape["data"], two.shape["fsdp"]) == (1, 2)
    with pytest.raises(UserError, match=r"parallel\.fsdp=4 need a multiple of 4 devices.*are 2"):
        make_mesh(ParallelConfig(fsdp=4))
    with pytest.raises(UserError, match=r"parallel\.data=1, parallel\.fsdp=2|leave parallel\.data"):
        make_mesh(ParallelConfig(data=1))


def test_without_a_mesh_every_sum_is_the_share_itself():
    x = jnp.arange(4)
    assert axes.axis_sizes() == {} == axes.manual_axes()
    assert axes.shared_by() == 1
    assert axes.sum_over_batch(x) is x is axes.gather_rows(x) is axes.own_rows(x)
    np.testing.assert_array_equal(axes.sum_over_earlier(x), 0)
    assert axes.by_rows(x) is x


def test_sums_and_rows_over_the_devices_that_share_the_batch():
    x = jnp.arange(12).reshape(4, 3)
    halves = x.reshape(2, 2, 3)
    np.testing.assert_array_equal(
        spread(axes.sum_over_batch, x), np.tile(halves.sum(axis=0), (2, 1))
    )
    earlier = np.concatenate([0 * halves[0], halves[0]])
    np.testing.assert_array_equal(spread(axes.sum_over_earlier, x), earlier)
    np.testing.assert_array_equal(spread(axes.gather_rows, x), np.tile(x, (2, 1)))
    there_and_back = spread(lambda rows: axes.own_rows(axes.gather_rows(rows)), x)
    np.testing.assert_array_equal(there_and_back, x)


def test_fake_devices_need_a_process_that_has_not_started_jax():
    assert jax.device_count() == 2
    ask_for_devices(ParallelConfig(fake_devices=2))  # these very devices are there
    require_devices(ParallelConfig(fake_devices=2))
    with pytest.raises(UserError, match="fake_devices=3, and JAX runs with 2 devices of cpu"):
        require_devices(ParallelConfig(fake_devices=3))
