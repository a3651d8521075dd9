"""P classes x K samples: the rule in the docstring of `dist_dml.data.balanced`, point by point."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_dml.data import balanced
from dist_dml.data.balanced import BalancedOrder, permuted_within, quota_of
from dist_dml.data.orders import group_rows
from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator

fast = settings(max_examples=60, deadline=None)


@st.composite
def orders(draw):
    """Classes of 1 to 12 images, now and then one of 60, in any order; P x K batches."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=14))
    sizes += draw(st.lists(st.integers(30, 60), max_size=2))
    classes_per_batch = draw(st.integers(1, len(sizes)))
    class_id = np.repeat(np.arange(len(sizes)) * 3, sizes)
    generator(draw(st.integers(0, 99))).shuffle(class_id)
    per_class = draw(st.integers(2, 5))
    return class_id, BalancedOrder(group_rows(class_id), classes_per_batch, per_class, 7)


def batches(order, epoch):
    drawn = order.take(epoch, 0, order.num_draws)
    return drawn.reshape(-1, order.classes_per_batch, order.samples_per_class)


def uses_by_class(order, epoch, class_id):
    """How often each sample of each class is drawn."""
    uses = np.bincount(batches(order, epoch).reshape(-1), minlength=len(class_id))
    return [uses[class_id == code] for code in np.unique(class_id)]


@fast
@given(orders(), st.integers(0, 5))
def test_a_batch_has_exactly_p_classes_with_k_samples(case, epoch):
    class_id, order = case
    for batch in class_id[batches(order, epoch)]:
        assert (batch == batch[:, :1]).all()
        assert len(set(batch[:, 0].tolist())) == order.classes_per_batch


@fast
@given(orders(), st.integers(0, 5))
def test_samples_of_a_group_are_as_different_as_the_class_permits(case, epoch):
    class_id, order = case
    sizes = Counter(class_id.tolist())
    for group in batches(order, epoch).reshape(-1, order.samples_per_class):
        number = sizes[int(class_id[group[0]])]
        uses = Counter(group.tolist())
        assert len(uses) == min(number, order.samples_per_class)
        assert max(uses.values()) == -(-order.samples_per_class // number)


@fast
@given(orders(), st.integers(0, 5))
def test_uses_within_a_class_are_the_floor_or_ceiling_of_their_mean(case, epoch):
    class_id, order = case
    for uses in uses_by_class(order, epoch, class_id):
        assert uses.sum() >= order.samples_per_class  # Every class comes.
        assert uses.sum() % order.samples_per_class == 0
        assert uses.min() >= uses.sum() // len(uses)
        assert uses.max() <= -(-uses.sum() // len(uses))


@fast
@given(orders(), st.integers(0, 5))
def test_every_sample_of_a_class_that_fits_comes_in_every_epoch(case, epoch):
    class_id, order = case
    steps = len(batches(order, epoch))
    needed = sum(
        -(-len(uses) // order.samples_per_class) for uses in uses_by_class(order, 0, class_id)
    )
    assert steps == -(-needed // order.classes_per_batch)
    for uses in uses_by_class(order, epoch, class_id):
        if len(uses) <= steps * order.samples_per_class:
            assert uses.min() >= 1
        else:
            assert uses.sum() == steps * order.samples_per_class


@fast
@given(orders(), st.integers(0, 2))
def test_what_a_cut_class_leaves_out_comes_in_its_next_epochs(case, block):
    class_id, order = case
    used = len(batches(order, 0)) * order.samples_per_class
    for number, code in enumerate(np.unique(class_id)):
        epochs = -(-int(np.sum(class_id == code)) // used)
        if epochs > 1:
            uses = sum(
                uses_by_class(order, block * epochs + i, class_id)[number] for i in range(epochs)
            )
            assert set(np.unique(uses)) <= {1, 2}


def test_a_class_that_is_cut_is_in_every_batch():
    class_id = np.repeat([0, 1, 2], [100, 3, 3])
    order = BalancedOrder(group_rows(class_id), 2, 4, 0)
    assert order.quota.steps == 14  # ceil((25 + 1 + 1) / 2), where class 0 alone has 25 groups.
    assert (class_id[batches(order, 0)][:, :, 0] == 0).sum(axis=1).tolist() == [1] * 14


@fast
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(2, 6), st.data())
def test_the_quota_is_the_most_passes_that_fit(sizes, per_class, data):
    classes_per_batch = data.draw(st.integers(1, len(sizes)))
    sizes = np.array(sizes)
    quota = quota_of(sizes, classes_per_batch, per_class)
    total = quota.steps * classes_per_batch
    assert quota.groups.sum() + quota.spare == total
    assert (quota.groups >= np.minimum(quota.steps, -(-sizes // per_class))).all()
    # Nobody has had a pass more than another could have: the next group of any class would be of
    # a later pass than the last of every other.
    last = (quota.groups - 1) * per_class / sizes
    raised = quota.groups > -(-sizes // per_class)
    following = quota.groups * per_class / sizes
    if raised.any() and len(quota.takers):
        assert last[raised].max() <= following[quota.takers].min() + 1e-9


def test_spare_groups_go_round_over_the_epochs():
    class_id = np.repeat(np.arange(10), 4)  # 10 groups in batches of 4: 2 are spare.
    order = BalancedOrder(group_rows(class_id), 4, 4, 0)
    more = [
        [int(uses[0]) - 1 for uses in uses_by_class(order, epoch, class_id)] for epoch in range(5)
    ]
    assert [sum(epoch) for epoch in more] == [2] * 5
    assert np.sum(more, axis=0).tolist() == [1] * 10


@fast
@given(orders(), st.data())
def test_it_does_not_depend_on_how_it_is_taken(case, data):
    _, order = case
    cut = data.draw(st.integers(0, order.num_draws))
    parts = [order.take(1, 0, cut), order.take(0, 0, 1), order.take(1, cut, order.num_draws)]
    assert np.array_equal(np.concatenate([parts[0], parts[2]]), batches(order, 1).reshape(-1))


def test_epochs_and_seeds_differ_in_classes_places_and_samples():
    class_id = np.repeat(np.arange(40), 10)
    groups = group_rows(class_id)
    first, second = (batches(BalancedOrder(groups, 8, 4, 0), epoch) for epoch in (0, 1))
    other = batches(BalancedOrder(groups, 8, 4, 1), 0)
    assert not np.array_equal(class_id[first], class_id[second])
    assert not np.array_equal(class_id[first], class_id[other])
    together = [{frozenset(group) for group in epoch.reshape(-1, 4)} for epoch in (first, second)]
    assert len(together[0] & together[1]) <= 12  # Of 120: the same four seldom meet again.
    places = {int(np.argmax(class_id[batch][:, 0] == 5)) for batch in first if 5 in class_id[batch]}
    assert len(places) > 1  # A class is not always in the same worker's slice.


@pytest.mark.parametrize("chunk", [10, 1000, 2**22])
def test_permutations_within_groups_are_uniform_whatever_is_sorted_at_a_time(chunk, monkeypatch):
    monkeypatch.setattr(balanced, "_CHUNK", chunk)
    groups = group_rows(np.repeat(np.arange(6000), 3))
    shuffled = permuted_within(groups, generator(1)).reshape(-1, 3)
    assert np.array_equal(np.sort(shuffled, axis=1), np.arange(18000).reshape(-1, 3))
    counts = np.unique(shuffled - shuffled.min(axis=1, keepdims=True), axis=0, return_counts=True)
    assert len(counts[1]) == 6
    assert (abs(counts[1] - 1000) < 150).all()  # Five standard deviations.


def test_balanced_batches_never_change_between_versions():
    order = BalancedOrder(group_rows(np.arange(12) % 3), 2, 2, 0)
    assert order.take(1, 0, 8).tolist() == PINNED


PINNED = [6, 9, 7, 4, 5, 8, 10, 1]


def test_too_few_classes_are_refused_with_what_fits():
    with pytest.raises(UsageError, match=r"data\.batch_size=16 .*samples_per_class=4.* 4 classes.*"
                       r" has 3; set data\.batch_size to at most 12") as caught:  # fmt: skip
        BalancedOrder(group_rows(np.arange(30) % 3), 4, 4, 0)
    assert "\n" not in str(caught.value)
