import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.base.errors import UserError
from moe_jax.config.presets import PRESETS
from moe_jax.model.abstract import abstract_states
from moe_jax.model.layout import shardings
from moe_jax.model.parameters import dotted, kind_of
from moe_jax.parallel import rules
from moe_jax.parallel.mesh import AXES
from moe_jax.parallel.rules import place


@pytest.mark.parametrize(
    ("letters", "shape", "sizes", "layout"),
    [
        ("D H·A", (8, 6), {"fsdp": 2}, P("fsdp", None)),
        ("D H·A", (8, 6), {"fsdp": 2, "tensor": 3}, P("fsdp", "tensor")),
        ("H·A D", (6, 8), {"fsdp": 2, "tensor": 3}, P("tensor", "fsdp")),
        ("E D 2F", (4, 8, 6), {"fsdp": 2, "expert": 4}, P("expert", "fsdp", None)),
        ("E F D", (4, 6, 8), {"fsdp": 2, "expert": 4, "tensor": 2}, P("expert", "tensor", "fsdp")),
        # one dimension over two axes, the tensor axis outermost
        ("D 2F", (8, 6), {"fsdp": 2, "tensor": 2}, P(("tensor", "fsdp"), None)),
        ("D R", (8, 5), {"fsdp": 2, "expert": 4, "tensor": 3}, P(("expert", "fsdp"), None)),
        # the next dimension where the first one does not divide
        ("D H·A", (7, 6), {"fsdp": 2}, P(None, "fsdp")),
        ("D 2F", (7, 6), {"fsdp": 2}, P(None, "fsdp")),
        ("V D", (9, 8), {"expert": 2, "fsdp": 8}, P(None, "expert")),
        ("D", (8,), {"fsdp": 2}, P(None)),
        ("E", (8,), {"expert": 2}, P(None)),
        ("D E", (8, 4), {"data": 2}, P(None, None)),
    ],
)
def test_a_parameter_is_split_by_its_letters(letters, shape, sizes, layout):
    assert place(letters.split(), shape, sizes) == layout


def test_a_large_parameter_that_nothing_divides_is_named(monkeypatch):
    monkeypatch.setattr(rules, "SMALL", 30)
    assert place(["D", "R"], (5, 6), {"fsdp": 7}) == P(None, None)
    message = r"parallel\.fsdp=7 divides no dimension of a\.b \(5, 8\) \(D F\), which"
    with pytest.raises(UserError, match=message):
        place(["D", "F"], (5, 8), {"fsdp": 7}, "a.b")


LAYOUTS = {
    "deepseek_v3": [{"fsdp": 32, "expert": 64}, {"fsdp": 16, "tensor": 8}],
    "deepseek_v2_lite": [{"fsdp": 8}, {"fsdp": 2, "expert": 8, "tensor": 2}],
    "qwen3_30b_a3b": [{"fsdp": 64}, {"fsdp": 8, "expert": 8, "tensor": 4}],
    "olmoe_1b_7b": [{"fsdp": 8}, {"expert": 8}, {"tensor": 8}],
    "mixtral_8x7b": [{"fsdp": 8}, {"expert": 8}, {"tensor": 8}],
    "tiny": [{"fsdp": 4, "expert": 2}],
}


@pytest.mark.parametrize("whole_experts", [True, False])
@pytest.mark.parametrize("preset", LAYOUTS)
def test_published_models_are_split_over_all_axes(preset, whole_experts):
    """Every matrix over every axis, but for those without a dimension for the tensor axis."""
    parameters, _ = abstract_states(PRESETS[preset].resolved().model)
    for sizes in LAYOUTS[preset]:
        mesh = jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
        own = shardings(mesh, parameters, whole_experts)
        for path, sharding in jax.tree_util.tree_leaves_with_path(own):
            kind = kind_of(path)
            used = {a for part in sharding.spec for a in np.atleast_1d(part) if a is not None}
            wanted = set(sizes)
            if not set(kind.axes.split()) & set(rules.TENSOR_SPLITS):
                wanted -= {"tensor"}
            assert len(kind.axes.split()) == 1 or used == wanted, (dotted(path), sharding.spec)
            if kind.role == "expert" and "expert" in sizes:
                assert (sharding.spec[-3] == "expert") == whole_experts  # E is third from the end


def test_an_axis_that_is_too_long_for_a_model_is_refused_by_name():
    parameters, _ = abstract_states(PRESETS["deepseek_v3"].resolved().model)
    mesh = jax.sharding.AbstractMesh((1, 1, 2048, 1, 1), AXES)
    with pytest.raises(UserError, match=r"parallel\.fsdp=2048 divides no dimension of dense"):
        shardings(mesh, parameters)
