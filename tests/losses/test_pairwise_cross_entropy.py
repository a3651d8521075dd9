"""SPCE and PCE: loops from the formulas, cross-entropies, hand-worked numbers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.center import squared_distances_to_means
from dist_dml.losses.pairs import AnchorLoss, LabelledPairs, PairLoss, compare, labelled_pairs_of
from dist_dml.losses.pairwise_cross_entropy import (
    SPCE,
    pairwise_cross_entropy,
    pairwise_cross_entropy_parts,
    ridge_weight,
)

IGNORED = -1
LABELS = torch.tensor([7, 2, 7, 0, 2, 7, 7, 2, 0, 4])


def some_rows(rows: int = 10, width: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, width, generator=generator, dtype=torch.float64)


def block(rows: Tensor, labels: Tensor, own: Tensor) -> LabelledPairs:
    values = compare(rows[own], rows, "inner")
    return labelled_pairs_of(values, labels[own], labels, own, IGNORED)


def mean_of(part: AnchorLoss) -> Tensor:
    return part.values.sum() / part.weights.sum().clamp_min(1)


def spce(rows: Tensor, labels: Tensor, num_classes: int | None = None) -> Tensor:
    return mean_of(SPCE(num_classes).of_anchors(block(rows, labels, torch.arange(len(rows)))))


def spce_by_loops(rows: Tensor, labels: Tensor, classes: list[int]) -> float:
    n, tightness, contrastive = len(rows), 0.0, 0.0
    for i in range(n):
        mass = 0.0
        for k in classes:
            logit = 0.0
            for j in range(n):
                if labels[j] == k:
                    logit += float(rows[i] @ rows[j]) / n
            mass += math.exp(logit)
            tightness -= logit / n if labels[i] == k else 0.0
        contrastive += math.log(mass) / n
    return tightness + contrastive


def test_spce_is_worked_by_hand() -> None:
    """z = 1 and 2 of two classes: logits 1/2, 1 and 1, 2; log(1 + e^.5) and log(1 + e^-1)."""
    rows = torch.tensor([[1.0], [2]], dtype=torch.float64)
    wanted = (math.log1p(math.exp(0.5)) + math.log1p(math.exp(-1))) / 2
    torch.testing.assert_close(spce(rows, torch.tensor([5, 3])).item(), wanted)
    assert abs(wanted - 0.643669) < 1e-6


def test_spce_equals_the_sums_of_its_equation() -> None:
    rows = some_rows()
    torch.testing.assert_close(spce(rows, LABELS).item(), spce_by_loops(rows, LABELS, [0, 2, 4, 7]))
    every = spce_by_loops(rows, LABELS, list(range(9)))
    torch.testing.assert_close(spce(rows, LABELS, num_classes=9).item(), every)
    assert every > spce(rows, LABELS).item() + 0.01  # Absent classes count.


def test_spce_is_cross_entropy_with_class_sums_over_n_in_value_and_gradient() -> None:
    ours, theirs = some_rows().requires_grad_(), some_rows().requires_grad_()
    weights = F.one_hot(LABELS, 9).double().T @ theirs / len(LABELS)
    wanted = F.cross_entropy(theirs @ weights.T, LABELS)
    value = spce(ours, LABELS, num_classes=9)
    torch.testing.assert_close(value, wanted)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_spce_has_the_gradient_of_its_value() -> None:
    leaf = some_rows().requires_grad_()
    for classes in (None, 4, 30):
        assert torch.autograd.gradcheck(partial(spce, labels=LABELS, num_classes=classes), (leaf,))


def test_spce_in_blocks_equals_the_whole_batch() -> None:
    rows, loss = some_rows(), SPCE()
    assert isinstance(loss, PairLoss)
    whole = loss.of_anchors(block(rows, LABELS, torch.arange(10)))
    blocks = [loss.of_anchors(block(rows, LABELS, own)) for own in torch.arange(10).split(3)]
    torch.testing.assert_close(torch.cat([part.values for part in blocks]), whole.values)
    torch.testing.assert_close(torch.cat([part.weights for part in blocks]), whole.weights)


def test_spce_leaves_out_ignored_rows_as_if_they_were_not_there() -> None:
    rows, labels = some_rows(), torch.where(LABELS == 2, IGNORED, LABELS)
    kept = labels != IGNORED
    torch.testing.assert_close(spce(rows, labels), spce(rows[kept], labels[kept]))
    leaf = rows.clone().requires_grad_()
    spce(leaf, torch.full_like(labels, IGNORED)).backward()
    assert leaf.grad is not None
    assert leaf.grad.count_nonzero() == 0


def pce_by_loops(rows: Tensor, labels: Tensor, p: Tensor, ridge: float) -> tuple[float, float]:
    """Eq. 12, every double sum a double loop."""
    n, classes = p.shape
    tightness, contrastive = 0.0, 0.0
    for i in range(n):
        for j in range(n):
            if labels[i] == labels[j]:
                tightness -= float(rows[i] @ rows[j]) / (2 * ridge * n * n)
        mass = 0.0
        for k in range(classes):
            mass += math.exp(
                sum(float(p[j, k] * (rows[i] @ rows[j])) for j in range(n)) / ridge / n
            )
        contrastive += math.log(mass) / n
    for k in range(classes):
        mean = sum((p[i, k] * rows[i] for i in range(n)), torch.zeros_like(rows[0])) / n
        contrastive -= float(mean @ mean) / (2 * ridge)
    return tightness, contrastive


def batch_of_three_classes(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rows, theta = some_rows(12, 3, seed), some_rows(3, 3, seed + 1)
    return rows, torch.arange(12) % 3, theta


def test_pce_equals_the_sums_of_its_equation() -> None:
    rows, labels, theta = batch_of_three_classes()
    p = (rows @ theta.T).softmax(1)
    parts = pairwise_cross_entropy_parts(rows, labels, p, 0.8)
    wanted = pce_by_loops(rows, labels, p, 0.8)
    assert (parts.tightness.item(), parts.contrastive.item()) == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(pairwise_cross_entropy(rows, labels, p, 0.8).item(), sum(wanted))


def test_pce_has_the_gradient_of_its_value_through_features_and_probabilities() -> None:
    rows, labels, theta = batch_of_three_classes()

    def value(z: Tensor, weights: Tensor) -> Tensor:
        return pairwise_cross_entropy(z, labels, (z @ weights.T).softmax(1), 0.8)

    assert torch.autograd.gradcheck(value, (rows.requires_grad_(), theta.requires_grad_()))


def test_pce_is_cross_entropy_of_the_soft_means_less_the_squared_gradient() -> None:
    rows, labels, theta = batch_of_three_classes()
    ridge, leaf = 0.7, theta.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(rows @ leaf.T, labels), leaf)
    p = (rows @ theta.detach().T).softmax(1)
    soft = p.T @ rows / len(rows)
    wanted = F.cross_entropy(rows @ soft.T / ridge, labels) - gradient.square().sum() / 2 / ridge
    torch.testing.assert_close(pairwise_cross_entropy(rows, labels, p, ridge), wanted)


def test_pce_of_certain_labels_at_ridge_1_is_spce() -> None:
    rows, labels, _ = batch_of_three_classes()
    certain = F.one_hot(labels, 3).double()
    torch.testing.assert_close(
        pairwise_cross_entropy(rows, labels, certain, 1.0), spce(rows, labels)
    )


def test_pce_tightness_is_center_loss_for_balanced_unit_rows() -> None:
    """Eq. 14 with its constants: (T_center - n/2) / (lambda n C), T_center the paper's sum."""
    rows, labels, _ = batch_of_three_classes()
    rows, p = F.normalize(rows), torch.full((12, 3), 1 / 3, dtype=torch.float64)
    center = squared_distances_to_means(rows, labels).sum() / 2
    parts = pairwise_cross_entropy_parts(rows, labels, p, 0.7)
    torch.testing.assert_close(parts.tightness, (center - 12 / 2) / (0.7 * 12 * 3))


@pytest.mark.parametrize("seed", range(5))
def test_first_half_of_cross_entropy_is_never_below_the_tightness_of_pce(seed: int) -> None:
    """Eq. 26-27, the half of Proposition 1's proof that holds; equality at theta = h / lambda."""
    rows, labels, theta = batch_of_three_classes(seed)
    ridge = 0.1 + seed
    hard = F.one_hot(labels, 3).double().T @ rows / 12

    def first_half(weights: Tensor) -> Tensor:
        return -(weights[labels] * rows).sum() / 12 + ridge / 2 * weights.square().sum()

    p = torch.full((12, 3), 1 / 3, dtype=torch.float64)
    tightness = pairwise_cross_entropy_parts(rows, labels, p, ridge).tightness
    assert first_half(theta) > tightness
    torch.testing.assert_close(first_half(hard / ridge), tightness)


# Six rows of one feature, a third of each side with the other side's label.
SIDES = torch.tensor([[1.0], [1], [1], [-1], [-1], [-1]], dtype=torch.float64)
SIDE_LABELS = torch.tensor([0, 0, 1, 1, 1, 0])


def both_losses(half_gap: float) -> tuple[float, float, float]:
    """CE of theta = (half_gap, -half_gap), lambda by eq. 25, PCE."""
    logits = SIDES @ torch.tensor([[half_gap, -half_gap]], dtype=torch.float64)
    ridge = ridge_weight(SIDES, logits.softmax(1))
    pce = pairwise_cross_entropy(SIDES, SIDE_LABELS, logits.softmax(1), ridge)
    return F.cross_entropy(logits, SIDE_LABELS).item(), ridge, pce.item()


def test_proposition_1_holds_for_a_classifier_at_zero() -> None:
    """p = 1/2: CE = log 2 = .693147, lambda = 1/4, cs = 0, h = 1/6 and -1/6.

    PCE = log 2 - 2 (2/36) = .582036, below CE; and so for any data, as cs_k is the same for all k.
    """
    ce, ridge, pce = both_losses(0.0)
    assert (ce, ridge, pce) == pytest.approx((math.log(2), 1 / 4, math.log(2) - 1 / 9), rel=1e-12)
    assert pce < ce


def test_proposition_1_fails_at_the_minimum_of_cross_entropy() -> None:
    """p = 2/3, the labels' frequency: CE = .636514, lambda = 2/9, cs = h = 1/6 and -1/6.

    cs / lambda = 3/4 and -3/4 is more certain than the best: PCE = log(1 + e^-1.5) + .5 = .701413.
    """
    ce, ridge, pce = both_losses(math.log(2) / 2)
    entropy = math.log(3) - 2 / 3 * math.log(2)
    wanted = math.log1p(math.exp(-1.5)) + 0.5
    assert (ce, ridge, pce) == pytest.approx((entropy, 2 / 9, wanted), rel=1e-12)
    assert pce > ce


def test_no_ridge_saves_proposition_1_at_the_minimum_of_cross_entropy() -> None:
    """PCE = CE(cs / lambda) there, never below the minimum; equal where cs / lambda is theta."""
    p = torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]], dtype=torch.float64).repeat_interleave(3, 0)
    ce = math.log(3) - 2 / 3 * math.log(2)
    for ridge in (0.01, 0.1, 0.4, 0.6, 1.0, 100.0):
        assert pairwise_cross_entropy(SIDES, SIDE_LABELS, p, ridge).item() > ce
    best = 1 / (3 * math.log(2))
    assert pairwise_cross_entropy(SIDES, SIDE_LABELS, p, best).item() == pytest.approx(ce)


def test_pce_refuses_too_few_rows_and_no_ridge_with_a_line() -> None:
    rows, labels, theta = batch_of_three_classes()
    p = (rows @ theta.T).softmax(1)
    with pytest.raises(UsageError, match=r"has 2 rows of 3 features.*choose `ridge`$"):
        ridge_weight(rows[:2], p[:2])
    for ridge in (0.0, -1.0, math.nan):
        with pytest.raises(UsageError, match=r"^pairwise cross-entropy got ridge .* choose it$"):
            pairwise_cross_entropy(rows, labels, p, ridge)


def test_ridge_weight_is_the_least_eigenvalue_of_any_class() -> None:
    """Orthogonal rows: the matrices are diagonal, p (1 - p) z^2 / 2 their entries."""
    rows = torch.tensor([[2.0, 0], [0, 3]], dtype=torch.float64)
    p = torch.tensor([[0.5, 0.4, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)
    wanted = min(0.25 * 4, 0.24 * 4, 0.09 * 4, 0.16 * 9, 0.24 * 9) / 2
    assert ridge_weight(rows, p) == pytest.approx(wanted, rel=1e-12)
