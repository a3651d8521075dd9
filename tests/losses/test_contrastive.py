"""Contrastive losses against pytorch-metric-learning, the papers' sums, and numbers by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses, reducers
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.contrastive import Contrastive, c1, c2, squared_contrastive
from dist_dml.losses.pairs import PairLoss, Pairs, compare, pairs_of

N, D = 14, 5
LABELS = [0] * 6 + [1] * 3 + [2] * 2 + [3, 4, 5]  # Unlike sizes, three rows alone.


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, D, generator=generator, dtype=torch.float64)
    return rows.requires_grad_(), torch.tensor(LABELS)[torch.randperm(N, generator=generator)]


def loss_of(
    loss: PairLoss, rows: Tensor, labels: Tensor, bounds: tuple[int, ...] = (0, N)
) -> Tensor:
    """Of the normalised rows, put together from blocks of anchors."""
    unit, parts = F.normalize(rows), []
    for start, stop in itertools.pairwise(bounds):
        own = torch.arange(start, stop)
        values = compare(unit[own], unit, loss.comparison)
        parts.append(loss.of_anchors(pairs_of(values, labels[own], labels, own, -1)))
    weight = torch.cat([part.weights for part in parts]).sum().clamp_min(1)
    return torch.cat([part.values for part in parts]).sum() / weight


def assert_equal_with_gradient(ours: Tensor, wanted: Tensor, rows: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-13)
    (gradient,) = torch.autograd.grad(ours, rows, retain_graph=True)
    (wanted_gradient,) = torch.autograd.grad(wanted, rows)
    assert wanted_gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("margins", [(0.0, 0.3841), (0.2858, 1.2)])
def test_c2_equals_the_library_as_it_comes(margins: tuple[float, float], seed: int) -> None:
    rows, labels = batch(seed)
    positive, negative = c2(*margins)
    ours = loss_of(positive, rows, labels) + loss_of(negative, rows, labels)
    wanted = losses.ContrastiveLoss(*margins)(rows, labels)
    assert_equal_with_gradient(ours, wanted, rows)


@pytest.mark.parametrize("seed", range(3))
def test_c1_equals_the_librarys_sum_over_the_number_of_rows(seed: int) -> None:
    rows, labels = batch(seed)
    oracle = losses.ContrastiveLoss(
        pos_margin=1,
        neg_margin=0.5,
        distance=distances.CosineSimilarity(),
        reducer=reducers.SumReducer(),
    )
    assert_equal_with_gradient(loss_of(c1(), rows, labels), oracle(rows, labels) / N, rows)


@pytest.mark.parametrize("seed", range(3))
def test_the_default_equals_the_librarys_sum_over_the_number_of_rows(seed: int) -> None:
    rows, labels = batch(seed)
    oracle = losses.ContrastiveLoss(0.2, 1.1, reducer=reducers.SumReducer())
    ours = loss_of(Contrastive("l2", 0.2, 1.1), rows, labels)
    assert_equal_with_gradient(ours, oracle(rows, labels) / N, rows)


@pytest.mark.parametrize("seed", range(3))
def test_the_squared_form_is_equation_2_of_paper_b(seed: int) -> None:
    rows, labels = batch(seed)
    unit = F.normalize(rows)
    wanted = torch.zeros((), dtype=torch.float64)
    for i, j in itertools.permutations(range(N), 2):
        distance = (unit[i] - unit[j]).norm()
        cost = distance**2 if labels[i] == labels[j] else (1.2 - distance).clamp_min(0) ** 2
        wanted = wanted + cost / N
    assert_equal_with_gradient(loss_of(squared_contrastive(1.2), rows, labels), wanted, rows)


@pytest.mark.parametrize("loss", [c1(), *c2(0.2, 1.2), squared_contrastive()])
@pytest.mark.parametrize("bounds", [(0, 5, 9, N), tuple(range(N + 1))])
def test_blocks_of_anchors_put_together_are_the_whole(
    bounds: tuple[int, ...], loss: Contrastive
) -> None:
    rows, labels = batch(0)
    wanted = loss_of(loss, rows, labels)
    assert_equal_with_gradient(loss_of(loss, rows, labels, bounds), wanted, rows)


@pytest.mark.parametrize("loss", [c1(), *c2(0.2, 1.2), squared_contrastive()])
def test_ignored_rows_are_as_if_they_were_not_there(loss: Contrastive) -> None:
    rows, labels = batch(1)
    kept = torch.arange(N) % 3 != 1
    ours = loss_of(loss, rows, torch.where(kept, labels, -1))
    wanted = loss_of(loss, rows[kept], labels[kept], (0, int(kept.sum())))
    assert_equal_with_gradient(ours, wanted, rows)


def two_anchors(values: list[list[float]]) -> Pairs:
    """Rows 0 and 1 are alike, 2 and 3 two others."""
    labels = torch.tensor([0, 0, 1, 2])
    own = torch.arange(2)
    return pairs_of(torch.tensor(values, dtype=torch.float64), labels[own], labels, own, -1)


def test_values_by_hand() -> None:
    cosines = two_anchors([[1.0, 0.25, 0.75, 0.5], [0.25, 1.0, -1.0, 0.625]])
    # .75 for the positive each, .25 beyond the margin of .5; .125.
    assert c1().of_anchors(cosines).values.tolist() == [1.0, 0.875]
    lengths = two_anchors([[0.0, 0.75, 0.25, 0.5], [0.75, 0.0, 2.0, 0.375]])
    assert squared_contrastive(0.5).of_anchors(lengths).values.tolist() == [0.625, 0.578125]
    positive, negative = (part.of_anchors(lengths) for part in c2(0.25, 0.5))
    assert positive.values.tolist() == [0.5, 0.5]
    assert positive.weights.tolist() == [1, 1]
    # A negative on the margin is no term.
    assert negative.values.tolist() == [0.25, 0.125]
    assert negative.weights.tolist() == [1, 1]


def test_pairs_on_the_margin_have_no_gradient() -> None:
    cosines = two_anchors([[1.0, 1.0, 0.5, 0.75], [1.0, 1.0, 0.5, 0.25]])
    values = cosines.values.requires_grad_()
    (gradient,) = torch.autograd.grad(c1().of_anchors(cosines).values.sum(), values)
    assert gradient.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_weights_of_anchors_without_positives_or_any_pair() -> None:
    labels = torch.tensor([0, 0, 1, -1])
    values = torch.zeros(4, 4, dtype=torch.float64)
    pairs = pairs_of(values, labels, labels, torch.arange(4), -1)
    assert c1().of_anchors(pairs).weights.tolist() == [1, 1, 1, 0]
    alone = pairs_of(values[:1, :1], labels[:1], labels[:1], torch.arange(1), -1)
    for loss in (c1(), *c2()):
        assert [part.tolist() for part in loss.of_anchors(alone)] == [[0], [0]]


def test_the_parts_add_up_to_the_whole() -> None:
    rows, labels = batch(2)
    parts = sum((loss_of(part, rows, labels) for part in c1().parts()), torch.tensor(0.0))
    assert_equal_with_gradient(parts, loss_of(c1(), rows, labels), rows)


def test_a_mean_over_the_terms_of_both_parts_is_refused() -> None:
    with pytest.raises(UsageError, match=r"got part 'both', expected 'positive' or 'negative'"):
        Contrastive(reduction="nonzero")


def test_the_losses_are_pair_losses() -> None:
    assert all(isinstance(loss, PairLoss) for loss in (c1(), *c2(), squared_contrastive()))
