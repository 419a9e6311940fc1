import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.parallel.mesh import DATA, data_parallel, make_mesh, map_over_data


def test_without_a_mesh_it_is_the_function_itself():
    def function(x, p):
        return x, p

    assert data_parallel() == 1
    assert map_over_data(function) is function


def test_each_device_gets_its_rows_and_parameters_are_shared():
    def function(x, scale):
        return x * scale, lax.psum(x.sum(), DATA)

    x = jnp.arange(12.0).reshape(4, 3)
    with jax.set_mesh(make_mesh(2)):
        assert data_parallel() == 2
        out, total = jax.jit(map_over_data(function))(x, jnp.array(2.0))
        gradient = jax.jit(jax.grad(lambda s: map_over_data(function)(x, s)[0].sum()))(2.0)
    np.testing.assert_array_equal(out, 2 * x)
    assert total == x.sum()
    assert gradient == x.sum(), "gradients of parameters are summed over devices"
