"""Relative labels: rows in several sets, one labelling at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_dml.losses.contrastive import c1
from dist_dml.losses.pairs import (
    AnchorLoss,
    LabelledPairs,
    PairLoss,
    Pairs,
    compare,
    labelled_pairs_of,
)
from dist_dml.losses.pairwise_cross_entropy import SPCE
from dist_dml.losses.relative_labels import RelativeLoss

IGNORED = -100
LABELS = torch.tensor([0, 1, 2, 3, 1, 0, IGNORED, 2, 3, 4])
# Class 3 is in no set, and classes 0 and 2 in the same.
SETS = torch.tensor([5, 7, 5, IGNORED, 7])


def some_rows() -> Tensor:
    return torch.randn(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def block(rows: Tensor, labels: Tensor, own: Tensor) -> LabelledPairs:
    values = compare(rows[own], rows, "inner")
    return labelled_pairs_of(values, labels[own], labels, own, IGNORED)


def mean_of(part: AnchorLoss) -> Tensor:
    return part.values.sum() / part.weights.sum().clamp_min(1)


class Seen:
    """Keeps the pairs that it is shown."""

    comparison = "inner"

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        self.pairs = pairs
        return AnchorLoss(pairs.values.sum(1), torch.ones(len(pairs.values)))


def test_rows_pair_up_by_the_sets_of_their_classes() -> None:
    """Anchors: row 0 (class 0, set 5) and row 3 (class 3, no set)."""
    seen = Seen()
    own = torch.tensor([0, 3])
    relative = RelativeLoss(seen, SETS)
    assert isinstance(relative, PairLoss)
    assert relative.comparison == "inner"
    found = relative.of_anchors(block(some_rows(), LABELS, own))
    # Classes 0 and 2 are alike, class 1 and 4 are not; no pair with itself, row 6, or class 3.
    assert seen.pairs.same[0].nonzero().flatten().tolist() == [2, 5, 7]
    assert seen.pairs.other[0].nonzero().flatten().tolist() == [1, 4, 9]
    assert not bool(seen.pairs.same[1].any() | seen.pairs.other[1].any())
    assert found.weights.tolist() == [1, 0]
    assert found.values[1] == 0
    assert isinstance(seen.pairs, LabelledPairs)
    assert seen.pairs.labels.tolist() == [5, 7, 5, -100, 7, 5, -100, 5, -100, 7]


@pytest.mark.parametrize("loss", [SPCE(), SPCE(num_classes=4), c1(0.5)], ids=str)
def test_the_loss_is_that_of_the_rows_with_a_set_under_their_sets_as_labels(loss: PairLoss) -> None:
    rows = some_rows()
    labels = torch.tensor([5, 7, 5, IGNORED, 7, 5, IGNORED, 5, IGNORED, 7])
    kept = labels != IGNORED
    everything = torch.arange(10)
    leaf, other = rows.clone().requires_grad_(), rows[kept].clone().requires_grad_()
    found = mean_of(RelativeLoss(loss, SETS).of_anchors(block(leaf, LABELS, everything)))
    few = torch.arange(int(kept.sum()))
    wanted = mean_of(loss.of_anchors(block(other, labels[kept], few)))
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[kept], other.grad)
    assert leaf.grad[~kept].count_nonzero() == 0


def test_sets_that_are_the_classes_change_nothing() -> None:
    rows, own = some_rows(), torch.arange(10)
    pairs = block(rows, LABELS, own)
    same = RelativeLoss(SPCE(), torch.arange(5)).of_anchors(pairs)
    plain = SPCE().of_anchors(pairs)
    torch.testing.assert_close(mean_of(same), mean_of(plain))
