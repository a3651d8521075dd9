"""The plan: exact epochs, whatever cuts them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_dml.data.plan import Plan, row_counts, worker_slice
from dist_dml.errors import UsageError

plans = st.builds(
    lambda n, batch, accumulate, seed, start: Plan(
        np.arange(start, start + 3 * n, 3), batch, accumulate, seed
    ),
    st.integers(1, 200),
    st.integers(1, 60),
    st.integers(1, 5),
    st.integers(0, 2**63 - 1),
    st.integers(0, 1000),
)


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 3))
def test_every_sample_is_seen_exactly_once_an_epoch(plan, epoch):
    first = epoch * plan.steps_per_epoch
    batches = [plan.global_batch(first + i) for i in range(plan.steps_per_epoch)]
    assert sorted(np.concatenate(batches)) == sorted(plan.sample_ids)
    assert all(len(batch) == plan.batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= plan.batch_size


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 20), st.integers(1, 7))
def test_slices_of_all_workers_are_the_global_batch(plan, step, num_workers):
    rebuilt, places = [], []
    for positions, ids in plan.micro_batches(step):
        counts = row_counts(len(ids), num_workers)
        for rank in range(num_workers):
            mine = worker_slice(len(ids), rank, num_workers)
            assert len(ids[mine]) == counts[rank]
            rebuilt.append(ids[mine])
            places.append(positions[mine])
        assert max(counts) - min(counts) <= 1
    assert np.array_equal(np.concatenate(rebuilt), plan.global_batch(step))
    assert np.array_equal(np.concatenate(places), np.arange(len(plan.global_batch(step))))


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 20))
def test_micro_batches_differ_by_at_most_one_row(plan, step):
    sizes = [len(ids) for _, ids in plan.micro_batches(step)]
    assert len(sizes) == plan.accumulate
    assert max(sizes) - min(sizes) <= 1


def test_a_batch_depends_on_seed_and_epoch_alone():
    ids = np.arange(1000)
    plan = Plan(ids, 64, seed=5)
    later = plan.global_batch(40).copy()
    plan.global_batch(3)
    assert np.array_equal(Plan(ids, 64, seed=5).global_batch(40), later)
    assert not np.array_equal(Plan(ids, 64, seed=6).global_batch(40), later)
    assert not np.array_equal(plan.global_batch(40 + plan.steps_per_epoch), later)


def test_the_order_never_changes_between_versions():
    assert Plan(np.arange(10), 5, seed=0).global_batch(0).tolist() == [6, 1, 5, 2, 8]


def test_drop_last_leaves_out_the_short_batch_only():
    plan = Plan(np.arange(103), 10, drop_last=True)
    assert (plan.steps_per_epoch, plan.samples_per_epoch) == (10, 100)
    seen = np.concatenate([plan.global_batch(i) for i in range(10)])
    assert len(set(seen.tolist())) == 100
    assert Plan(np.arange(103), 10).samples_per_epoch == 103
    assert Plan(np.arange(100), 10, drop_last=True).samples_per_epoch == 100


def test_an_epoch_without_a_batch_is_refused():
    with pytest.raises(UsageError, match=r"data\.batch_size=8 .*drop_last=true.* 5 samples"):
        Plan(np.arange(5), 8, drop_last=True)


@settings(max_examples=100, deadline=None)
@given(plans, st.integers(1, 8), st.booleans())
def test_check_rows_refuses_exactly_the_plans_with_an_empty_slice(plan, num_workers, drop_last):
    if drop_last and len(plan.sample_ids) < plan.batch_size:
        return
    plan = Plan(plan.sample_ids, plan.batch_size, plan.accumulate, plan.seed, drop_last)
    smallest = min(
        len(ids) for step in range(plan.steps_per_epoch) for _, ids in plan.micro_batches(step)
    )
    if smallest >= num_workers:
        plan.check_rows(num_workers)
    else:
        with pytest.raises(UsageError, match=r"data\.batch_size=") as caught:
            plan.check_rows(num_workers)
        assert "\n" not in str(caught.value)


def test_too_few_rows_name_the_key_that_helps():
    with pytest.raises(UsageError, match=r"last batch.* 1 rows.*data\.drop_last=true"):
        Plan(np.arange(101), 10).check_rows(2)
    with pytest.raises(UsageError, match=r"a global batch.*accumulate=4.*raise data\.batch_size"):
        Plan(np.arange(100), 10, accumulate=4).check_rows(3)
