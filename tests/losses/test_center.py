"""Center loss from pairs against class means, loops and numbers worked by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_dml.losses.center import CenterLoss, squared_distances_to_means
from dist_dml.losses.pairs import AnchorLoss, compare, pairs_of

IGNORED = -1


def features_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = 3 * torch.randn(9, 4, generator=generator, dtype=torch.float64)
    return features, torch.tensor([7, 7, 2, 7, 2, 0, 7, 2, 7])  # Unbalanced, one alone.


def of_block(rows: Tensor, labels: Tensor, own: Tensor) -> AnchorLoss:
    values = compare(rows[own], rows, CenterLoss().comparison)
    return CenterLoss().of_anchors(pairs_of(values, labels[own], labels, own, IGNORED))


def of_batch(rows: Tensor, labels: Tensor) -> Tensor:
    values, weights = of_block(rows, labels, torch.arange(len(rows)))
    return values.sum() / weights.sum().clamp_min(1)


def test_center_loss_is_worked_by_hand() -> None:
    """Means 2 and 5: squared distances 4, 0, 4 and 0; half their mean is 1."""
    rows = torch.tensor([[0.0], [2], [4], [5]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1])
    assert squared_distances_to_means(rows, labels).tolist() == [4, 0, 4, 0]
    torch.testing.assert_close(of_batch(rows, labels).item(), 1.0)


def test_center_loss_of_pairs_equals_the_distances_to_class_means() -> None:
    rows, labels = features_and_labels()
    wanted = torch.zeros((), dtype=torch.float64)
    for row, label in zip(rows, labels, strict=True):
        mean = torch.stack(
            [other for other, its in zip(rows, labels, strict=True) if its == label]
        ).mean(0)
        wanted += (row - mean).square().sum() / 2 / len(rows)
    torch.testing.assert_close(of_batch(rows, labels), wanted)
    torch.testing.assert_close(squared_distances_to_means(rows, labels).mean() / 2, wanted)


def test_center_loss_of_pairs_has_the_gradient_through_the_means() -> None:
    rows, labels = features_and_labels()
    of_pairs, of_means = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    of_batch(of_pairs, labels).backward()
    (squared_distances_to_means(of_means, labels).mean() / 2).backward()
    torch.testing.assert_close(of_pairs.grad, of_means.grad)
    assert torch.autograd.gradcheck(lambda z: of_batch(z, labels), (rows.requires_grad_(),))


def test_center_loss_in_blocks_equals_the_whole_batch() -> None:
    rows, labels = features_and_labels()
    whole = of_block(rows, labels, torch.arange(9))
    blocks = [of_block(rows, labels, own) for own in torch.arange(9).split(4)]
    torch.testing.assert_close(torch.cat([block.values for block in blocks]), whole.values)
    torch.testing.assert_close(torch.cat([block.weights for block in blocks]), whole.weights)


def test_ignored_rows_move_no_mean_and_lonely_ones_count() -> None:
    rows, labels = features_and_labels()
    ignored = torch.where(labels == 2, IGNORED, labels)
    kept = labels != 2
    torch.testing.assert_close(of_batch(rows, ignored), of_batch(rows[kept], labels[kept]))
    values, weights = of_block(rows, ignored, torch.arange(9))
    torch.testing.assert_close(weights, kept.double())  # The row alone in its class among them.
    assert values[5] == 0
