"""Mixtures: shares that hold anywhere in the run, parts that run through whole passes."""

from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_dml.data.mixture import Mixture
from dist_dml.data.orders import SequentialOrder, ShuffledOrder, group_rows
from dist_dml.data.windows import ShardOrder, WindowOrder

fast = settings(max_examples=60, deadline=None)


# Plain values: an object made in a strategy would be checked by beartype there, which draws random
# numbers, and Hypothesis forbids that.
parts = st.lists(
    st.tuples(st.integers(1, 40), st.floats(0.01, 5.0), st.integers(0, 3)), min_size=1, max_size=4
)


def mixture_of(parts):
    """A mixture of (size, weight, kind) whose part k holds the positions 100 k .. 100 k + size."""
    orders, rows = [], []
    for number, (size, _, kind) in enumerate(parts):
        shards = group_rows(np.arange(size) // 5)
        kinds = (
            ShuffledOrder(size, number),
            SequentialOrder(size),
            WindowOrder(shards, 2, number),
            ShardOrder(shards),
        )
        orders.append(kinds[kind])
        rows.append(100 * number + np.arange(size))
    return Mixture(tuple(orders), tuple(rows), tuple(weight for _, weight, _ in parts))


def run_of(mixture, stop):
    """The first `stop` draws of the whole run."""
    length = mixture.num_draws
    epochs = [mixture.take(epoch, 0, length) for epoch in range(-(-stop // length))]
    return np.concatenate(epochs)[:stop]


@fast
@given(parts)
def test_shares_hold_at_any_draw_of_the_run(parts):
    mixture = mixture_of(parts)
    part = run_of(mixture, 400) // 100
    number, shares = len(mixture.weights), np.array(mixture.weights) / sum(mixture.weights)
    for k, share in enumerate(shares):
        had = np.concatenate([[0], np.cumsum(part == k)])
        assert (abs(had - share * np.arange(401)) <= 0.5 + share * number / 2 + 1e-9).all()


@fast
@given(parts, st.integers(1, 64))
def test_every_batch_has_its_shares_to_a_few_rows(parts, rows):
    mixture = mixture_of(parts)
    part = run_of(mixture, 8 * rows).reshape(8, rows) // 100
    shares = np.array(mixture.weights) / sum(mixture.weights)
    for k, share in enumerate(shares):
        assert (abs((part == k).sum(axis=1) - share * rows) <= 1 + share * len(shares) + 1e-9).all()


@fast
@given(parts)
def test_a_part_runs_through_its_passes_whatever_the_others_do(parts):
    mixture = mixture_of(parts)
    drawn = run_of(mixture, 300)
    for number, (order, rows) in enumerate(zip(mixture.orders, mixture.rows, strict=True)):
        mine = drawn[drawn // 100 == number]
        passes = [order.take(i, 0, order.num_draws) for i in range(len(mine) // len(rows) + 1)]
        assert np.array_equal(mine, rows[np.concatenate(passes)[: len(mine)]])
        whole = len(mine) // len(rows) * len(rows)
        assert set(Counter(mine[:whole].tolist()).values()) <= {whole // len(rows)}


@fast
@given(parts, st.data())
def test_it_does_not_depend_on_how_it_is_taken(parts, data):
    mixture = mixture_of(parts)
    number = mixture.num_draws
    bounds = sorted([0, number, *data.draw(st.lists(st.integers(0, number), max_size=5))])
    pieces = [mixture.take(3, start, stop) for start, stop in pairwise(bounds)]
    assert np.array_equal(np.concatenate(pieces), run_of(mixture, 4 * number)[3 * number :])


def test_an_epoch_has_as_many_draws_as_all_parts():
    mixture = Mixture(
        (ShuffledOrder(30, 0), ShuffledOrder(5, 1)), (np.arange(30), np.arange(30, 35)), (1.0, 1.0)
    )
    assert mixture.num_draws == 35


def test_one_part_is_that_part():
    order = ShuffledOrder(23, 4)
    mixture = Mixture((order,), (np.arange(23),), (0.3,))
    for epoch in range(3):
        assert np.array_equal(mixture.take(epoch, 5, 23), order.take(epoch, 5, 23))


def test_equal_weights_take_turns():
    mixture = Mixture(
        (SequentialOrder(3), SequentialOrder(3)), (np.arange(3), np.arange(3) + 100), (2.0, 2.0)
    )
    assert mixture.take(0, 0, 6).tolist() == [0, 100, 1, 101, 2, 102]


def test_shares_hold_late_in_a_long_run():
    mixture = Mixture(
        (SequentialOrder(10**6), SequentialOrder(10**5)),
        (np.arange(10**6), np.arange(10**5) + 10**6),
        (0.7, 0.3),
    )
    epoch = 10**6  # 1.1 * 10^12 draws have come.
    part = mixture.take(epoch, 0, 10_000) >= 10**6
    assert abs(int(part.sum()) - 3000) <= 2
    again = mixture.take(epoch, 5_000, 10_000) >= 10**6
    assert np.array_equal(part[5_000:], again)


def test_windows_of_all_parts_come_as_they_fall_due():
    shards = [np.arange(40) // 10, 4 + np.arange(20) // 10]
    mixture = Mixture(
        tuple(ShardOrder(group_rows(shard)) for shard in shards),
        (np.arange(40), 40 + np.arange(20)),
        (2.0, 1.0),
    )
    ahead = list(islice(mixture.windows_from(0), 7))
    assert [int(codes[0]) for _, codes in ahead] == [0, 4, 1, 2, 5, 3, 0]
    column = np.concatenate(shards)
    for draw in range(120):
        epoch, start = divmod(draw, 60)
        needed = int(column[mixture.take(epoch, start, start + 1)[0]])
        due = [
            int(codes[0]) for first, codes in islice(mixture.windows_from(draw), 3) if first <= draw
        ]
        assert needed in due


@pytest.mark.parametrize("weights", [(1.0, 3.0), (2.0, 6.0)])
def test_the_identity_has_shares_of_one(weights):
    mixture = Mixture(
        (ShuffledOrder(3, 0), ShuffledOrder(3, 1)), (np.arange(3), np.arange(3, 6)), weights
    )
    assert mixture.identity() == {"weights": [0.25, 0.75]}
