import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from moe_jax.model.abstract import abstract_model
from moe_jax.parallel.mesh import AXES
from tests.conftest import SMALL_MODEL


def test_a_model_runs_as_a_whole_beside_a_pipeline():
    """Evaluation and samples do. All devices of a pipeline compute the same then."""
    axes = (AxisType.Auto,) * len(AXES)
    mesh = AbstractMesh((2, 2, 1, 1, 1), AXES, axis_types=axes)
    graph, state = nnx.split(abstract_model(SMALL_MODEL))
    tokens = jax.ShapeDtypeStruct((4, 8), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        hidden = jax.eval_shape(lambda s, t: nnx.merge(graph, s).hidden(t, t)[0], state, tokens)
    assert hidden.shape == (4, 8, SMALL_MODEL.width)
