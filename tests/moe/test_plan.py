import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.moe.plan import block_count, block_rows, make_plan

plan_of = jax.jit(make_plan, static_argnums=1)


def check_plan(experts: np.ndarray, num_experts: int) -> None:
    tokens, per_token = experts.shape
    plan = jax.tree.map(np.asarray, plan_of(experts, num_experts))
    flat, size = experts.reshape(-1), experts.size
    np.testing.assert_array_equal(plan.counts, np.bincount(flat, minlength=num_experts))
    filled = plan.assignment[plan.assignment < size]
    assert sorted(filled) == list(range(size)), "every assignment has exactly one row"
    np.testing.assert_array_equal(plan.assignment[plan.row.reshape(-1)], np.arange(size))
    rows = len(plan.assignment) // len(plan.block_expert)
    for row, assignment in enumerate(plan.assignment):
        if assignment < size:
            assert plan.block_expert[row // rows] == flat[assignment], "a block has one expert"
    for expert in range(num_experts):
        mine = [a for a in filled if flat[a] == expert]
        assert mine == sorted(mine), "earlier tokens come first"
    assert plan.row.shape == (tokens, per_token)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_assignment_has_one_row_in_a_block_of_its_expert(data):
    # Few shapes, many routings: each new shape is a compilation.
    tokens, per_token, num_experts = data.draw(
        st.sampled_from([(1, 1, 1), (1, 3, 5), (7, 2, 3), (33, 2, 8), (40, 4, 4)])
    )
    seed = data.draw(st.integers(0, 2**32 - 1))
    skew = data.draw(st.sampled_from([0.0, 3.0]))
    scores = np.random.default_rng(seed).gumbel(size=(tokens, num_experts))
    scores[:, 0] += skew
    check_plan(np.argsort(-scores, axis=1)[:, :per_token].astype(np.int32), num_experts)


@pytest.mark.parametrize("num_experts", [1, 2, 9])
def test_all_tokens_to_one_expert(num_experts):
    check_plan(np.full((37, 1), num_experts - 1, np.int32), num_experts)


def test_experts_without_tokens():
    check_plan(np.array([[1, 4], [4, 1], [1, 4]], np.int32), 6)


@given(st.integers(1, 4000), st.integers(1, 300), st.data())
def test_blocks_suffice_for_every_routing(assignments, experts, data):
    rows = block_rows(assignments, experts)
    touched = data.draw(st.integers(1, min(experts, assignments)))
    # The worst split over `touched` experts: as many blocks as possible hold a single row.
    needed = (touched - 1) + -(-(assignments - touched + 1) // rows)
    assert needed <= block_count(assignments, experts, rows)
    assert 8 <= rows <= 128
