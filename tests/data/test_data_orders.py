"""Orders of one data set: exact epochs, repeats, windows of whole shards."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_dml.data.orders import RepeatedOrder, SequentialOrder, ShuffledOrder, group_rows
from dist_dml.data.windows import ShardOrder, WindowOrder
from dist_dml.keyed_random import generator, key_of

columns = st.lists(st.integers(0, 7), min_size=1, max_size=80).map(np.array)
seeds = st.integers(0, 2**63 - 1)
fast = settings(max_examples=50, deadline=None)


def whole(order, epoch):
    return order.take(epoch, 0, order.num_draws)


def orders_of(shard, seed, window_shards):
    return (
        SequentialOrder(len(shard)),
        ShuffledOrder(len(shard), seed),
        RepeatedOrder(group_rows(shard), 0.0, seed),
        ShardOrder(group_rows(shard)),
        WindowOrder(group_rows(shard), window_shards, seed),
    )


@fast
@given(columns)
def test_groups_hold_every_position_once_and_ascend(values):
    groups = group_rows(values)
    places = groups.at(np.arange(len(values)))
    for code, start, stop in zip(groups.codes, groups.starts, groups.starts[1:], strict=False):
        assert np.array_equal(places[start:stop], np.flatnonzero(values == code))
    assert np.array_equal(groups.codes, np.unique(values))
    assert groups.num_rows == groups.sizes.sum() == len(values)
    assert (groups.rows is None) == (sorted(values) == list(values))


@fast
@given(columns, seeds, st.integers(1, 9), st.integers(0, 3))
def test_every_position_comes_once_an_epoch(shard, seed, window_shards, epoch):
    for order in orders_of(shard, seed, window_shards):
        assert order.num_draws == len(shard)
        assert np.array_equal(np.sort(whole(order, epoch)), np.arange(len(shard)))


@fast
@given(columns, seeds, st.integers(1, 9), st.data())
def test_an_order_does_not_depend_on_how_it_is_taken(shard, seed, window_shards, data):
    for order in orders_of(shard, seed, window_shards):
        number = order.num_draws
        inner = data.draw(st.lists(st.integers(0, number), max_size=6))
        bounds = sorted([0, *inner, number])
        taken = [order.take(2, start, stop) for start, stop in pairwise(bounds)]
        order.take(1, 0, number)  # Another epoch between two reads changes nothing.
        again = order.take(2, bounds[1], number)
        assert np.array_equal(np.concatenate(taken), whole(order, 2))
        assert np.array_equal(again, whole(order, 2)[bounds[1] :])


@pytest.mark.parametrize("kind", [1, 2, 4])
def test_epochs_and_seeds_give_other_orders(kind):
    shard = np.repeat(np.arange(20), 10)
    first, other = (orders_of(shard, seed, 3)[kind] for seed in (1, 2))
    assert not np.array_equal(whole(first, 0), whole(first, 1))
    assert not np.array_equal(whole(first, 0), whole(other, 0))


@pytest.mark.parametrize("number", [1, 2, 17, 100_000])
def test_a_permutation_in_four_bytes_is_that_of_eight(number):
    """Checkpoints of the first version hold steps of this permutation."""
    expected = generator(key_of(3, "plan", 4)).permutation(number)
    assert np.array_equal(whole(ShuffledOrder(number, 3), 4), expected)


def test_orders_never_change_between_versions():
    shard = np.array([0, 0, 1, 1, 1, 2, 3, 3])
    assert whole(ShuffledOrder(8, 0), 1).tolist() == SHUFFLED
    assert whole(RepeatedOrder(group_rows(shard), 0.5, 0), 1).tolist() == REPEATED
    assert whole(WindowOrder(group_rows(shard), 2, 0), 1).tolist() == WINDOWS


SHUFFLED = [7, 2, 5, 3, 4, 6, 1, 0]
REPEATED = [5, 1, 2, 0, 5, 7, 3, 4, 1, 7, 6]
WINDOWS = [5, 4, 3, 2, 6, 0, 1, 7]


@fast
@given(columns, seeds, st.floats(0.001, 1.0))
def test_classes_are_repeated_by_the_root_of_how_rare_they_are(class_id, seed, below):
    order = RepeatedOrder(group_rows(class_id), below, seed)
    drawn = np.bincount(class_id[whole(order, 0)], minlength=8)
    for class_number, draws in enumerate(drawn):
        images = int(np.sum(class_id == class_number))
        if images:
            factor = max(1.0, np.sqrt(below / (images / len(class_id))))
            assert abs(draws - factor * images) <= 0.5 + 1e-9
    assert drawn.sum() == order.num_draws


@fast
@given(columns, seeds, st.floats(0.001, 1.0), st.integers(1, 6))
def test_repeats_within_a_class_rotate_over_the_epochs(class_id, seed, below, epochs):
    order = RepeatedOrder(group_rows(class_id), below, seed)
    used = np.zeros(len(class_id), int)
    for epoch in range(epochs):
        now = np.bincount(whole(order, epoch), minlength=len(class_id))
        used += now
        assert now.min() >= 1
        for class_number in np.unique(class_id):
            mine = class_id == class_number
            assert np.ptp(now[mine]) <= 1
            assert np.ptp(used[mine]) <= 1


def test_without_rare_classes_repeats_change_nothing():
    class_id = np.arange(60) % 3
    repeated = RepeatedOrder(group_rows(class_id), 1 / 3, 5)
    assert np.array_equal(whole(repeated, 2), whole(ShuffledOrder(60, 5), 2))


def windows_of(order, epoch):
    """The windows of one epoch, from what the order says is to be fetched."""
    found = []
    for first, shards in order.windows_from(epoch * order.num_draws):
        if first >= (epoch + 1) * order.num_draws:
            return found
        found.append((first - epoch * order.num_draws, shards.tolist()))
    raise AssertionError("windows never end")


@fast
@given(columns, seeds, st.integers(1, 9), st.integers(0, 3))
def test_a_window_is_whole_shards_and_windows_are_even(shard, seed, window_shards, epoch):
    order = WindowOrder(group_rows(shard), window_shards, seed)
    drawn, windows = whole(order, epoch), windows_of(order, epoch)
    for (first, shards), (end, _) in pairwise([*windows, (len(shard), [])]):
        expected = np.flatnonzero(np.isin(shard, shards))
        assert np.array_equal(np.sort(drawn[first:end]), expected)
    sizes = [len(shards) for _, shards in windows]
    assert max(sizes) <= window_shards
    assert max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-len(np.unique(shard)) // window_shards)


def test_samples_mix_within_a_window_and_not_beyond():
    shard = np.repeat(np.arange(12), 50)
    order = WindowOrder(group_rows(shard), 4, 9)
    drawn = whole(order, 0)
    for start in (0, 200, 400):
        codes = shard[drawn[start : start + 200]]
        assert len(set(codes.tolist())) == 4
        assert len(set(codes[:40].tolist())) == 4  # 40 of 200: each shard has come by chance.


def test_shards_in_order_are_the_split_as_it_lies():
    shard = np.array([3, 1, 3, 0, 1])
    order = ShardOrder(group_rows(shard))
    assert whole(order, 7).tolist() == [3, 1, 4, 0, 2]
    assert windows_of(order, 2) == [(0, [0]), (1, [1]), (3, [3])]


@fast
@given(columns, seeds, st.integers(1, 4), st.data())
def test_looking_ahead_starts_with_the_window_of_the_draw(shard, seed, window_shards, data):
    for order in orders_of(shard, seed, window_shards)[3:]:
        draw = data.draw(st.integers(0, 3 * order.num_draws - 1))
        epoch, within = divmod(draw, order.num_draws)
        ahead = order.windows_from(draw)
        (first, shards), (second, _) = next(ahead), next(ahead)
        assert first <= draw < second
        assert shard[order.take(epoch, within, within + 1)[0]] in shards


def test_windows_of_a_million_samples_need_no_permutation_of_them():
    shard = np.repeat(np.arange(1000), 1000)
    groups = group_rows(shard)
    tracemalloc.start()
    order = WindowOrder(groups, 4, 0)
    for start in range(0, 20_000, 500):
        order.take(3, start, start + 500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000  # A permutation takes 4,000,000 bytes, a window 16,000.
