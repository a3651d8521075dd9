"""The numbers of the diagnostics against their formulas, closed forms and invariances."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.diagnostics import (
    conditional_entropy,
    covering_radius,
    diagnose,
    effective_rank,
    feature_entropy,
    gaussian_cross_entropy,
    information_at_least,
    inter_class_distance,
    label_entropy,
    whole_classes,
)
from dist_dml.losses.k_center import k_center


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _classes(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (rows,), generator=generator) * 3 + 5


def _naive_entropy(rows: Tensor) -> float:
    """Equation 6, pair by pair."""
    n, features = rows.shape
    total = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += math.log(float(((rows[i] - rows[j]) ** 2).sum()))
    return features / (n * (n - 1)) * total


def test_entropies_are_the_formulas() -> None:
    rows, labels = _random(12, 3), _classes(12)
    labels[11] = 99  # Alone in its class, which has no estimate.
    assert math.isclose(float(feature_entropy(rows)), _naive_entropy(rows))
    within, counted = 0.0, 0
    for label in labels.unique():
        own = rows[labels == label]
        if len(own) > 1:
            within += len(own) * _naive_entropy(own)
            counted += len(own)
    assert counted < 12
    assert math.isclose(float(conditional_entropy(rows, labels)), within / counted)
    found = diagnose(rows, labels, ignored=-1)
    assert math.isclose(float(found.entropy), _naive_entropy(rows))
    assert math.isclose(float(found.entropy_within), within / counted)
    paired = torch.stack([(labels == label).sum() > 1 for label in labels])
    information = _naive_entropy(rows[paired]) - within / counted
    assert math.isclose(float(found.information), information)


def test_two_rows_by_hand() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    # D/(n(n-1)) * 2 log 25.
    assert math.isclose(float(feature_entropy(rows)), 2 * math.log(25), rel_tol=1e-6)
    assert math.isclose(float(inter_class_distance(rows, torch.tensor([0, 1]))), 5, rel_tol=1e-6)
    assert math.isnan(inter_class_distance(rows, torch.tensor([1, 1])))
    # One centre leaves 5, two leave 0; a class of one row has radius 0.
    assert float(covering_radius(rows, torch.tensor([7, 7]))) == 2.5
    assert float(covering_radius(rows, torch.tensor([7, 9]))) == 0
    # (1/2n) * 2 * 2.5^2 about the mean.
    wanted = math.log(2 * math.pi) + 3.125
    found = float(gaussian_cross_entropy(rows, torch.tensor([1, 1])))
    assert math.isclose(found, wanted, rel_tol=1e-6)


def test_equal_rows_have_a_small_entropy_and_no_infinite_one() -> None:
    entropy = feature_entropy(torch.ones(3, 4))
    assert math.isclose(float(entropy), 4 * 2 * math.log(1e-6), rel_tol=1e-6)
    assert math.isnan(feature_entropy(torch.ones(1, 4)))
    assert math.isnan(conditional_entropy(_random(3, 2), torch.tensor([0, 1, 2])))


def test_entropy_grows_by_two_d_log_a_where_rows_grow_by_a() -> None:
    rows, labels = _random(20, 6), _classes(20)
    grown = 2 * 6 * math.log(3)
    torch.testing.assert_close(feature_entropy(3 * rows), feature_entropy(rows) + grown)
    # The difference does not see the scale: it is information.
    before, after = diagnose(rows, labels, -1), diagnose(3 * rows, labels, -1)
    torch.testing.assert_close(before.information, after.information)


def test_information_is_larger_for_classes_that_are_apart() -> None:
    labels = torch.arange(40) % 4
    centres = 10 * _random(4, 5, seed=1)
    near, apart = _random(40, 5), _random(40, 5) + centres[labels]
    assert diagnose(apart, labels, -1).information > diagnose(near, labels, -1).information + 1
    assert abs(float(diagnose(near, labels, -1).information)) < 1


def test_the_gaussian_bound_is_the_entropy_of_a_gaussian_about_its_means() -> None:
    labels = torch.arange(20_000) % 4
    rows = _random(20_000, 3) + 5 * _random(4, 3, seed=1)[labels]
    exact = 3 / 2 * math.log(2 * math.pi * math.e)
    assert abs(float(gaussian_cross_entropy(rows, labels)) - exact) < 0.02
    # Narrower classes: H(Z|Y) falls by 3 log 2, the bound by less.
    narrow = rows - (1 - 0.5) * _random(20_000, 3)
    assert float(gaussian_cross_entropy(narrow, labels)) > exact - 3 * math.log(2) + 0.5
    # Center loss's tightness: the same up to constants.
    means = torch.stack([rows[labels == k].mean(0) for k in range(4)])
    tightness = (rows - means[labels]).square().sum() / 2
    wanted = tightness / 20_000 + 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(gaussian_cross_entropy(rows, labels), wanted)


def test_label_entropy_and_the_bound_it_gives() -> None:
    assert math.isclose(float(label_entropy(torch.tensor([3, 3, 9, 9, 11, 11]))), math.log(3))
    skewed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert math.isclose(float(label_entropy(torch.tensor([0, 0, 0, 5]))), skewed)
    labels = torch.arange(60) % 3
    # A classifier that knows: all of H(Y). One that knows nothing: none of it.
    knows = F.cross_entropy(100 * F.one_hot(labels).double(), labels)
    guesses = F.cross_entropy(torch.zeros(60, 3, dtype=torch.float64), labels)
    assert math.isclose(float(information_at_least(labels, knows)), math.log(3))
    assert abs(float(information_at_least(labels, guesses))) < 1e-12


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), features=st.integers(1, 4), rows=st.integers(2, 16))
def test_distances_between_classes_are_the_mean_over_pairs(
    seed: int, features: int, rows: int
) -> None:
    points, labels = _random(rows, features, seed=seed), _classes(rows, seed)
    distances = [
        float((points[i] - points[j]).norm())
        for i in range(rows)
        for j in range(rows)
        if labels[i] != labels[j]
    ]
    found = float(inter_class_distance(points, labels))
    if distances:
        assert math.isclose(found, sum(distances) / len(distances))
    else:
        assert math.isnan(found)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), features=st.integers(1, 3))
def test_the_covering_radius_is_each_counts_own_k_center_averaged(seed: int, features: int) -> None:
    points, labels = _random(14, features, seed=seed), _classes(14, seed)
    means = []
    for label in labels.unique():
        own = points[labels == label]
        start = own[(own - own.mean(0)).norm(dim=1).argmin()][None, None]
        radii = [float((own - start[0]).norm(dim=1).max())]
        for count in range(2, len(own) + 1):  # A separate run for each k.
            radii.append(float(k_center(own[None], count - 1, covering=start).radii[0, -1]))
        assert radii[-1] == 0
        means.append(sum(radii) / len(radii))
    found = float(covering_radius(points, labels))
    assert math.isclose(found, sum(means) / len(means), abs_tol=1e-12)


def test_a_line_of_four_has_the_covering_radius_worked_by_hand() -> None:
    rows = torch.tensor([[0.0], [4.0], [5.0], [11.0], [100.0]])
    labels = torch.tensor([1, 1, 1, 1, 2])
    # The mean is 5: radii 6 (from 5), then 11 and 5, then 0 and 1, then 4 and 0: mean 3. The class
    # of one row has 0.
    assert float(covering_radius(rows, labels)) == pytest.approx((6 + 5 + 1 + 0) / 4 / 2)


def test_effective_rank_of_equal_axes_is_their_number() -> None:
    axes = torch.linalg.qr(_random(8, 8)).Q
    for rank in (1, 3, 8):
        rows = _random(50, rank, seed=2)
        rows = torch.linalg.qr(rows).Q @ axes[:rank]
        assert math.isclose(float(effective_rank(rows)), rank, rel_tol=1e-9)
    uneven = torch.diag(torch.tensor([0.75, 0.25])).double()
    wanted = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert math.isclose(float(effective_rank(uneven)), wanted)
    assert math.isnan(effective_rank(torch.zeros(3, 2)))
    assert math.isnan(effective_rank(torch.zeros(0, 2)))


def test_no_number_sees_rotations_or_the_order_of_rows() -> None:
    rows, labels = _random(30, 5), _classes(30)
    wanted = diagnose(rows, labels, -1)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    rotation = torch.linalg.qr(_random(5, 5, seed=9)).Q
    for name, found in (
        ("order", diagnose(rows[order], labels[order], -1)),
        ("rotation", diagnose(rows @ rotation, labels, -1)),
        ("names of classes", diagnose(rows, 100 - labels, -1)),
    ):
        torch.testing.assert_close(torch.stack(list(found)), torch.stack(list(wanted)), msg=name)
    moved = diagnose(rows + 3, labels, -1)  # All but the rank, which is of the rows uncentred.
    torch.testing.assert_close(torch.stack(list(moved[:-1])), torch.stack(list(wanted[:-1])))
    assert moved.effective_rank < wanted.effective_rank - 0.1


def test_a_sample_is_of_whole_classes_spread_over_all_and_never_above_its_cap() -> None:
    labels = torch.arange(400) % 100  # Four rows of each class, apart.
    chosen = whole_classes(labels, 40, -1)
    assert labels[chosen].unique().tolist() == list(range(0, 100, 10))
    assert (labels[chosen].bincount() % 4 == 0).all()
    assert len(chosen) == 40
    hidden = torch.where(labels < 50, -1, labels)
    chosen = whole_classes(hidden, 40, -1)
    assert hidden[chosen].unique().tolist() == list(range(50, 100, 5))
    assert len(whole_classes(torch.zeros(100, dtype=torch.int64), 7, -1)) == 7
    assert torch.equal(whole_classes(labels[:9], 50, -1).sort().values, torch.arange(9))
    assert len(whole_classes(torch.full((5,), -1), 4, -1)) == 0


def test_rows_outside_the_sample_and_ignored_ones_are_of_no_account() -> None:
    rows, labels = _random(400, 4), torch.arange(400) % 100
    chosen = whole_classes(labels, 40, -1)
    noise = torch.full_like(rows, 1e9)
    noise[chosen] = rows[chosen]
    found = diagnose(noise, labels, -1, cap=40)
    assert torch.equal(torch.stack(list(found)), torch.stack(list(diagnose(rows, labels, -1, 40))))
    alone = diagnose(rows[chosen], labels[chosen], -1)
    torch.testing.assert_close(torch.stack(list(found)), torch.stack(list(alone)))


def test_numbers_that_a_sample_does_not_determine_are_nan_and_nonsense_is_refused() -> None:
    nothing = diagnose(_random(3, 2), torch.full((3,), -1), ignored=-1)
    assert torch.stack(list(nothing)).isnan().all()
    one_class = diagnose(_random(6, 2), torch.ones(6, dtype=torch.int64), ignored=-1)
    assert one_class.inter_class.isnan()
    assert abs(float(one_class.information)) < 1e-12
    assert diagnose(_random(6, 2).bfloat16(), torch.arange(6) // 2, -1).entropy.dtype.itemsize == 4
    with pytest.raises(UsageError, match="cap of diagnostics: got 1"):
        diagnose(_random(6, 2), torch.arange(6), -1, cap=1)
