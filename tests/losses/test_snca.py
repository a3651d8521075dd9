"""SNCA and NCA over pairs against pytorch-metric-learning and numbers by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import distances, losses
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import PairLoss, Pairs, compare, pairs_of
from dist_dml.losses.snca import NeighbourhoodComponents

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
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_with_cosines_it_equals_the_library(temperature: float, seed: int) -> None:
    rows, labels = batch(seed)
    oracle = losses.NCALoss(1 / temperature, distance=distances.CosineSimilarity())
    ours = loss_of(NeighbourhoodComponents(temperature), rows, labels)
    assert_equal_with_gradient(ours, oracle(rows, labels), rows)


@pytest.mark.parametrize("seed", range(3))
def test_with_squared_distances_it_equals_the_library_as_it_comes(seed: int) -> None:
    rows, labels = batch(seed)
    ours = loss_of(NeighbourhoodComponents(1.0, "squared_l2"), rows, labels)
    assert_equal_with_gradient(ours, losses.NCALoss()(rows, labels), rows)


def test_squared_distances_of_unit_rows_are_cosines_at_half_the_temperature() -> None:
    rows, labels = batch(3)
    ours = loss_of(NeighbourhoodComponents(0.2, "squared_l2"), rows, labels)
    wanted = loss_of(NeighbourhoodComponents(0.1), rows, labels)
    assert_equal_with_gradient(ours, wanted, rows)


@pytest.mark.parametrize("bounds", [(0, 5, 9, N), tuple(range(N + 1))])
def test_blocks_of_anchors_put_together_are_the_whole(bounds: tuple[int, ...]) -> None:
    rows, labels = batch(0)
    loss = NeighbourhoodComponents()
    wanted = loss_of(loss, rows, labels)
    assert_equal_with_gradient(loss_of(loss, rows, labels, bounds), wanted, rows)


def test_ignored_rows_are_as_if_they_were_not_there() -> None:
    rows, labels = batch(1)
    kept = torch.arange(N) % 3 != 1
    ours = loss_of(NeighbourhoodComponents(), rows, torch.where(kept, labels, -1))
    wanted = loss_of(NeighbourhoodComponents(), rows[kept], labels[kept], (0, int(kept.sum())))
    assert_equal_with_gradient(ours, wanted, rows)


def one_anchor(values: list[float], labels: list[int]) -> Pairs:
    """Of row 0."""
    of_all, own = torch.tensor(labels), torch.arange(1)
    return pairs_of(torch.tensor([values], dtype=torch.float64), of_all[own], of_all, own, -1)


def test_a_value_by_hand() -> None:
    # exp(s / t) is 2 and 4 for the positives, 8 and 16 for the negatives: -log(6 / 30).
    values = [99.0, *(0.5 * k * math.log(2) for k in (1, 2, 3, 4))]
    value, weight = NeighbourhoodComponents(0.5).of_anchors(one_anchor(values, [0, 0, 0, 1, 2]))
    assert value.item() == pytest.approx(math.log(5), rel=1e-14)
    assert weight.tolist() == [1]


# Anomaly detection says that it slows things down.
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    ("labels", "weight"),
    [([0, 1, 1], 0), ([0, 0, 0], 1), ([0, -1, -1], 0), ([-1, 0, 1], 0)],
    ids=["no positive", "no negative", "others ignored", "ignored"],
)
def test_anchors_that_lack_a_kind_of_pair_add_0_with_gradient_0(
    labels: list[int], weight: int
) -> None:
    pairs = one_anchor([1.0, 0.5, 0.25], labels)
    values = pairs.values.requires_grad_()
    with torch.autograd.detect_anomaly():
        value, weights = NeighbourhoodComponents().of_anchors(pairs)
        (gradient,) = torch.autograd.grad(value.sum(), values)
    assert value.tolist() == [0]
    assert weights.tolist() == [weight]
    assert gradient.tolist() == [[0, 0, 0]]


def test_it_keeps_its_digits_at_certainty_and_stays_finite_at_logits_of_1e4() -> None:
    right = one_anchor([0.0, 1.0, 0.0], [0, 0, 1])
    value, _ = NeighbourhoodComponents(1 / 100).of_anchors(right)
    assert value.item() == pytest.approx(math.exp(-100), rel=1e-12)
    wrong = one_anchor([0.0, -1.0, 1.0], [0, 0, 1])
    values = wrong.values.requires_grad_()
    value, _ = NeighbourhoodComponents(1e-4).of_anchors(wrong)
    assert value.item() == pytest.approx(2e4, rel=1e-14)
    (gradient,) = torch.autograd.grad(value.sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -1e4, 1e4]], dtype=torch.float64))


def test_gradients_of_the_values_by_differences() -> None:
    rows, labels = batch(0)
    unit, own = F.normalize(rows.detach()), torch.arange(N)
    cosines = (unit @ unit.mT).requires_grad_()

    def values(cosines: Tensor) -> Tensor:
        pairs = pairs_of(cosines, labels, labels, own, -1)
        return NeighbourhoodComponents(0.2).of_anchors(pairs).values

    assert torch.autograd.gradcheck(values, cosines)


def test_it_is_a_pair_loss() -> None:
    assert isinstance(NeighbourhoodComponents(), PairLoss)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match=r"got temperature 0, expected a number above 0"):
        NeighbourhoodComponents(0.0)
