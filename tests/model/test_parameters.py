"""The table of roles knows every parameter of every model, and nothing else."""

from dataclasses import replace

import jax
import pytest
from flax import nnx

from moe_jax.config.presets import PRESETS
from moe_jax.model.abstract import abstract_states
from moe_jax.model.parameters import ROLES, TABLE, dotted, kind_of, role_of
from moe_jax.train.state import abstract_state

VARIANTS = {
    **{name: config.resolved().model for name, config in PRESETS.items()},
    "multi-token prediction, untied": replace(
        PRESETS["tiny"].resolved().model, mtp_depth=2, tied_embedding=False
    ),
    "noisy": replace(
        PRESETS["tiny"].resolved().model,
        moe=replace(PRESETS["tiny"].model.moe, rule="noisy_top_k", gate="softmax", bias_rate=0.0),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_kind_with_its_number_of_axes(name):
    parameters, router = abstract_states(VARIANTS[name])
    for path, leaf in [*nnx.to_flat_state(parameters), *nnx.to_flat_state(router)]:
        stacked = "blocks" in path or "modules" in path
        assert leaf.ndim - stacked == len(kind_of(path).axes.split()), path


def test_the_table_has_no_row_that_no_model_uses():
    used = set()
    for model in VARIANTS.values():
        for state in abstract_states(model):
            names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
            used |= {end for end in TABLE for name in names if f".{name}".endswith(f".{end}")}
    assert used == set(TABLE)
    assert {kind.role for kind in TABLE.values()} == set(ROLES)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_have_the_roles_of_their_parameters(small_run, optimizer):
    config = replace(small_run, optim=replace(small_run.optim, optimizer=optimizer))
    state = abstract_state(config)
    roles = {
        dotted(path): role_of(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state.parameters)
    }
    moments = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(state.optimizer):
        name = next((name for name in roles if f".{dotted(path)}".endswith(f".{name}")), None)
        if name is not None:  # counters and Muon's coefficients belong to no parameter
            moments[name] = role_of(path)
    assert moments == roles


def test_an_unknown_parameter_is_named():
    with pytest.raises(KeyError, match=r"knows no parameter sparse\.blocks\.gadget\.weight"):
        role_of("sparse.blocks.gadget.weight")
