import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_kernels.schedule import choose_block_rows

from moe_jax.moe.plan import block_count, make_plan, sort_with_index

plan_of = jax.jit(make_plan, static_argnums=(1, 2))


def check_plan(experts: np.ndarray, num_experts: int, capacity: int | None = None) -> None:
    """Every property of a plan; ids of `num_experts` are nobody's."""
    tokens, per_token = experts.shape
    plan = jax.tree.map(np.asarray, plan_of(experts, num_experts, capacity))
    flat, size = experts.reshape(-1), experts.size
    load = np.bincount(flat, minlength=num_experts)[:num_experts]
    np.testing.assert_array_equal(plan.load, load)
    np.testing.assert_array_equal(plan.counts, load if capacity is None else load.clip(0, capacity))
    filled = plan.assignment[plan.assignment < size]
    kept = [a for e in range(num_experts) for a in np.flatnonzero(flat == e)[:capacity]]
    assert sorted(filled) == sorted(kept), "every kept assignment has exactly one row"
    row = plan.row.reshape(-1)
    np.testing.assert_array_equal(plan.assignment[row[kept]], kept)
    dropped = np.setdiff1d(np.arange(size), kept)
    assert (row[dropped] == len(plan.assignment)).all(), "a dropped assignment has no row"
    assert len(plan.assignment) == plan.block_rows * len(plan.block_expert)
    for at, assignment in enumerate(plan.assignment):
        if assignment < size:
            owner = plan.block_expert[at // plan.block_rows]
            assert owner == flat[assignment], "a block has one expert"
    for expert in range(num_experts):
        mine = plan.assignment[plan.starts[expert] :][: plan.counts[expert]]
        np.testing.assert_array_equal(mine, np.flatnonzero(flat == expert)[:capacity])
    assert plan.row.shape == (tokens, per_token)
    assert plan.counts.sum() <= plan.most


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
    experts = np.argsort(-scores, axis=1)[:, :per_token].astype(np.int32)
    nobody = np.random.default_rng(seed).uniform(size=experts.shape) < data.draw(
        st.sampled_from([0.0, 0.3, 1.0])
    )
    capacity = data.draw(st.sampled_from([None, 1, 5]))
    check_plan(np.where(nobody, num_experts, experts), num_experts, capacity)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_permuting_tokens_permutes_rows_within_experts(seed):
    generator = np.random.default_rng(seed)
    experts = np.argsort(generator.uniform(size=(33, 8)), axis=1)[:, :2].astype(np.int32)
    order = generator.permutation(33)
    plan, permuted = plan_of(experts, 8, None), plan_of(experts[order], 8, None)
    np.testing.assert_array_equal(plan.counts, permuted.counts)
    np.testing.assert_array_equal(plan.block_expert, permuted.block_expert)
    for expert in range(8):
        rows = slice(int(plan.starts[expert]), int(plan.starts[expert] + plan.counts[expert]))
        assert sorted(order[np.asarray(permuted.assignment[rows]) // 2]) == sorted(
            np.asarray(plan.assignment[rows]) // 2
        )


@given(st.sampled_from([1, 2, 33, 300]), st.sampled_from([1, 7, 2**31 - 1]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_sort_with_index_is_a_stable_sort(size, below, seed):
    keys = np.random.default_rng(seed).integers(0, below, size).astype(np.int32)
    found, index = sort_with_index(jnp.asarray(keys), below)
    np.testing.assert_array_equal(index, np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(found, np.sort(keys))


@pytest.mark.parametrize("num_experts", [1, 2, 9])
def test_all_tokens_to_one_expert(num_experts):
    check_plan(np.full((37, 1), num_experts - 1, np.int32), num_experts)


def test_experts_without_tokens():
    check_plan(np.array([[1, 4], [4, 1], [1, 4]], np.int32), 6)


@given(st.integers(1, 4000), st.integers(1, 300), st.data())
def test_blocks_suffice_for_every_routing(assignments, experts, data):
    rows = choose_block_rows(assignments, experts)
    touched = data.draw(st.integers(1, min(experts, assignments)))
    # The worst split over `touched` experts: as many blocks as possible hold a single row.
    needed = (touched - 1) + -(-(assignments - touched + 1) // rows)
    assert needed <= block_count(assignments, experts, rows)
    assert 16 <= rows <= 128
