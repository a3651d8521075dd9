"""Every order as a plan: workers cannot change it, it goes on anywhere, and it says what it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_dml.data.orders import SplitColumns
from dist_dml.data.plan import Plan, build_plan, plan_differences, worker_slice
from dist_dml.data_config import DataConfig, MixturePart
from dist_dml.errors import UsageError

OTHER = (MixturePart(path="b", weight=2.0), MixturePart(path="c", weight=0.5))
KINDS = {
    "shuffled": {},
    "sequential": {"order": "sequential"},
    "balanced": {"order": "balanced", "batch_size": 12, "samples_per_class": 3},
    "repeated": {"repeat_below": 0.4},
    "window": {"locality": "window", "window_shards": 2},
    "shards": {"locality": "window", "order": "sequential"},
    "mixture": {"mixture": OTHER},
    "mixture of windows": {"mixture": OTHER, "locality": "window", "window_shards": 2},
    "mixture of shards": {"mixture": OTHER, "locality": "window", "order": "sequential"},
    "mixture of repeats": {"mixture": OTHER, "repeat_below": 0.4},
}
EXACT = ("shuffled", "sequential", "window", "shards")


def columns_of(number=97):
    """Three parts; eight classes, the last with few samples; shards of 10 samples, 0 to 9."""
    row = np.arange(number)
    class_id = np.minimum(row * 7 % 11, 7).astype(np.int64)
    part = np.digitize(row // 10, [number // 20, number * 3 // 40]).astype(np.int8)
    return SplitColumns(class_id, (row // 10).astype(np.int32), part)


def plan_of(kind, batch_size=16, accumulate=1, seed=5, drop_last=False, columns=None):
    columns = columns or columns_of()
    keys = {"path": "a", "batch_size": batch_size, "drop_last": drop_last, **KINDS[kind]}
    ids = 1000 + 3 * np.arange(len(columns.class_id))
    return build_plan(ids, columns, DataConfig(**keys), accumulate, seed)


def batches_by(plan, num_workers, start, stop):
    """What all workers together train on from `start` to `stop`, as each cuts it for itself."""
    for step in range(start, stop):
        pieces = []
        for positions, ids in plan.micro_batches(step):
            mine = [worker_slice(len(ids), rank, num_workers) for rank in range(num_workers)]
            pieces += [(positions[rows], ids[rows]) for rows in mine]
        positions, ids = (np.concatenate(column) for column in zip(*pieces, strict=True))
        assert np.array_equal(positions, np.arange(len(ids)))
        yield ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_global_batches_are_the_same_for_any_number_of_workers(kind, accumulate):
    plan = plan_of(kind, accumulate=accumulate)
    steps = 2 * plan.steps_per_epoch + 1
    batches = [plan.global_batch(step).tolist() for step in range(steps)]
    for num_workers in (1, 2, 3, 4):
        assert list(batches_by(plan, num_workers, 0, steps)) == batches


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))
def test_stopped_at_any_step_it_continues_in_any_layout(kind, step, before, after, accumulate):
    through = list(batches_by(plan_of(kind, accumulate=accumulate), before, 0, step + 9))
    resumed = plan_of(kind, accumulate=accumulate)  # Another process: nothing is carried over.
    assert list(batches_by(resumed, after, step, step + 9)) == through[step:]


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 120), st.integers(1, 40), st.integers(0, 3))
def test_every_sample_comes_once_in_every_epoch(kind, number, batch_size, epoch):
    plan = plan_of(kind, batch_size, columns=columns_of(number))
    first = epoch * plan.steps_per_epoch
    batches = [plan.global_batch(first + i) for i in range(plan.steps_per_epoch)]
    assert np.array_equal(np.sort(np.concatenate(batches)), plan.sample_ids)
    assert [len(batch) for batch in batches] == [
        plan.num_rows(first + i) for i in range(len(batches))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_have_the_same_length_and_differ_unless_they_are_sequential(kind):
    plan = plan_of(kind)
    steps = plan.steps_per_epoch
    first, second = (
        [plan.global_batch(epoch * steps + i).tolist() for i in range(steps)] for epoch in (0, 1)
    )
    assert sum(map(len, first)) == sum(map(len, second)) == plan.samples_per_epoch
    assert (first == second) == (kind in ("sequential", "shards"))


def test_an_epoch_of_a_mixture_has_as_many_steps_as_one_data_set_of_that_size():
    assert plan_of("mixture").steps_per_epoch == plan_of("shuffled").steps_per_epoch == 7


def test_parts_of_a_mixture_are_drawn_by_weight_in_every_micro_batch():
    columns = columns_of()
    plan = plan_of("mixture", batch_size=28, accumulate=2)
    for step in range(plan.steps_per_epoch - 1):
        for _, ids in plan.micro_batches(step):
            counts = np.bincount(columns.part[(ids - 1000) // 3], minlength=3)
            assert (abs(counts - np.array([4, 8, 2])) <= 2).all()


def test_parts_have_permutations_of_their_own_and_the_first_has_the_plain_one():
    number = np.arange(90)
    columns = SplitColumns(
        number % 3, (number // 30).astype(np.int32), (number // 30).astype(np.int8)
    )
    alone = SplitColumns(
        *(column[:30] for column in (columns.class_id, columns.shard, columns.part))
    )
    mixed, plain = plan_of("mixture", columns=columns), plan_of("shuffled", columns=alone)
    drawn = np.concatenate([mixed.global_batch(step) for step in range(30)]) // 3 - 1000 // 3
    parts = [drawn[drawn // 30 == part][:30] % 30 for part in range(3)]
    expected = np.concatenate([plain.global_batch(step) for step in range(2)]) // 3 - 1000 // 3
    assert np.array_equal(parts[0], expected)
    assert not np.array_equal(parts[1], parts[0])
    assert not np.array_equal(parts[1], parts[2])


def test_micro_batches_of_balanced_batches_keep_classes_whole():
    columns = columns_of()
    plan = plan_of("balanced", accumulate=3)  # 4 classes of 3 samples in 3 pieces.
    sizes = []
    for step in range(plan.steps_per_epoch):
        for positions, ids in plan.micro_batches(step):
            classes = columns.class_id[(ids - 1000) // 3].reshape(-1, 3)
            assert (classes == classes[:, :1]).all()
            assert positions[0] % 3 == 0
            sizes.append(len(ids))
    assert set(sizes) == {3, 6}
    assert plan.max_micro_rows == 6
    plan.check_rows(3)
    with pytest.raises(
        UsageError, match="micro-batches of at least 3: expected a row for each of 4"
    ):
        plan.check_rows(4)


@pytest.mark.parametrize("kind", ["window", "shards", "mixture of windows", "mixture of shards"])
def test_shards_are_announced_before_they_are_read(kind):
    columns = columns_of()
    plan = plan_of(kind)
    for step in range(2 * plan.steps_per_epoch):
        read = set(columns.shard[(plan.global_batch(step) - 1000) // 3].tolist())
        few, more = (plan.shards_ahead(step, count).tolist() for count in (0, 2))
        assert read <= set(few)
        assert more[: len(few)] == few
        # A light part of a mixture may not come to its next window within an epoch.
        assert len(more) == min(len(few) + 2, 10) or "mixture" in kind
        assert len(few) < len(more) <= len(few) + 2 or len(few) >= 9
        assert len(set(more)) == len(more)


def test_shards_ahead_are_those_of_the_next_steps():
    plan, columns = plan_of("window"), columns_of()
    ahead = plan.shards_ahead(0, 100).tolist()
    assert sorted(ahead) == list(range(10))
    read = [
        int(shard)
        for step in range(plan.steps_per_epoch)
        for shard in columns.shard[(plan.global_batch(step) - 1000) // 3]
    ]
    windows = [ahead[i : i + 2] for i in range(0, 10, 2)]
    seen = [next(i for i, window in enumerate(windows) if shard in window) for shard in read]
    assert seen == sorted(seen)


@pytest.mark.parametrize("kind", ["shuffled", "sequential", "balanced", "repeated", "mixture"])
def test_orders_without_windows_announce_nothing(kind):
    assert len(plan_of(kind).shards_ahead(1, 4)) == 0


def test_the_shuffled_plan_is_that_of_the_first_version():
    ids = 1000 + 3 * np.arange(97)
    for drop_last in (False, True):
        plan, old = plan_of("shuffled", drop_last=drop_last), Plan(ids, 16, 1, 5, drop_last)
        assert plan.steps_per_epoch == old.steps_per_epoch
        assert all(np.array_equal(plan.global_batch(i), old.global_batch(i)) for i in range(20))
    first = {"seed": 5, "batch_size": 16, "accumulate": 1, "drop_last": False}
    assert plan_differences(first, plan_of("shuffled").identity()) == []


def test_plans_with_other_batches_have_other_identities():
    changed = [
        plan_of("shuffled", seed=6),
        plan_of("shuffled", batch_size=17),
        plan_of("shuffled", drop_last=True),
        plan_of("shuffled", columns=columns_of(96)),
        *(plan_of(kind) for kind in KINDS),
    ]
    facts = [json.dumps(plan.identity(), sort_keys=True) for plan in changed]
    assert len(set(facts)) == len(facts)
    for plan in changed:
        identity = plan.identity()
        assert plan_differences(json.loads(json.dumps(identity)), identity) == []


def test_other_shards_of_the_same_samples_change_the_identity_of_windows_alone():
    columns = columns_of()
    other = SplitColumns(columns.class_id, columns.shard // 2, columns.part)
    for kind in KINDS:
        differing = plan_differences(
            plan_of(kind).identity(), plan_of(kind, columns=other).identity()
        )
        assert bool(differing) == ("window" in kind or "shards" in kind)


def test_differences_read_old_to_new():
    old, new = plan_of("shuffled").identity(), plan_of("balanced").identity()
    assert plan_differences(old, new) == [
        "batch_size 16 -> 12",
        "order 'shuffled' -> 'balanced'",
        "samples_per_class unset -> 3",
    ]
    assert plan_differences(new, old)[1:] == [
        "order 'balanced' -> 'shuffled'",
        "samples_per_class 3 -> unset",
    ]
    assert plan_differences({"fingerprint": "a"}, {"fingerprint": "b"}) == [
        "fingerprint 'a' -> 'b'"
    ]
    assert plan_differences({}, {"steps_per_epoch": 3}) == []
    assert plan_differences({"steps_per_epoch": 2}, {"steps_per_epoch": 3}) != []


def test_a_part_without_samples_is_refused():
    columns = columns_of()
    none = SplitColumns(columns.class_id, columns.shard, np.minimum(columns.part, 1))
    with pytest.raises(
        UsageError, match=r"data\.mixture\[1\]\.path=c has no samples of split 'train'"
    ):
        plan_of("mixture", columns=none)
