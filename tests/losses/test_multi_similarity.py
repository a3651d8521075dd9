"""The multi-similarity loss and its miner against pytorch-metric-learning and numbers by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses, miners
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.multi_similarity import MultiSimilarity, mined_pairs
from dist_dml.losses.pairs import PairLoss, Pairs, compare, pairs_of

CAR_PARAMETERS = (14.35, 75.83, 0.66)

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
@pytest.mark.parametrize("parameters", [(2.0, 40.0, 0.5), CAR_PARAMETERS])
@pytest.mark.parametrize("epsilon", [None, 0.1, -0.2], ids=["all pairs", "mined", "mined, few"])
def test_it_equals_the_library(
    epsilon: float | None, parameters: tuple[float, float, float], seed: int
) -> None:
    rows, labels = batch(seed)
    mined = None if epsilon is None else miners.MultiSimilarityMiner(epsilon)(rows, labels)
    wanted = losses.MultiSimilarityLoss(*parameters)(rows, labels, mined)
    ours = loss_of(MultiSimilarity(*parameters, epsilon), rows, labels)
    assert_equal_with_gradient(ours, wanted, rows)


@pytest.mark.parametrize("epsilon", [0.1, -0.2])
def test_the_miner_keeps_the_librarys_pairs(epsilon: float) -> None:
    rows, labels = batch(4)
    unit = F.normalize(rows.detach())
    own = torch.arange(N)
    pairs = pairs_of(compare(unit, unit, "cosine"), labels, labels, own, -1)
    positives, negatives = mined_pairs(pairs, epsilon)
    first, positive, second, negative = miners.MultiSimilarityMiner(epsilon)(rows, labels)
    assert set(zip(*positives.nonzero().T.tolist(), strict=True)) == set(
        zip(first.tolist(), positive.tolist(), strict=True)
    )
    assert set(zip(*negatives.nonzero().T.tolist(), strict=True)) == set(
        zip(second.tolist(), negative.tolist(), strict=True)
    )
    assert 0 < positives.sum() < pairs.same.sum()
    assert 0 < negatives.sum() < pairs.other.sum()


@pytest.mark.parametrize("epsilon", [None, 0.1])
@pytest.mark.parametrize("bounds", [(0, 5, 9, N), tuple(range(N + 1))])
def test_blocks_of_anchors_put_together_are_the_whole(
    bounds: tuple[int, ...], epsilon: float | None
) -> None:
    rows, labels = batch(0)
    loss = MultiSimilarity(epsilon=epsilon)
    wanted = loss_of(loss, rows, labels)
    assert_equal_with_gradient(loss_of(loss, rows, labels, bounds), wanted, rows)


@pytest.mark.parametrize("epsilon", [None, 0.1])
def test_ignored_rows_are_as_if_they_were_not_there(epsilon: float | None) -> None:
    rows, labels = batch(1)
    kept = torch.arange(N) % 3 != 1
    loss = MultiSimilarity(epsilon=epsilon)
    ours = loss_of(loss, rows, torch.where(kept, labels, -1))
    wanted = loss_of(loss, rows[kept], labels[kept], (0, int(kept.sum())))
    assert_equal_with_gradient(ours, wanted, rows)


def one_anchor(values: list[float], labels: list[int]) -> Pairs:
    """Of row 0."""
    of_all, own = torch.tensor(labels), torch.arange(1)
    return pairs_of(torch.tensor([values], dtype=torch.float64), of_all[own], of_all, own, -1)


def test_values_by_hand() -> None:
    pairs = one_anchor([1.0, 0.5, 0.25, 0.5, 0.75], [0, 0, 0, 1, 2])
    loss = MultiSimilarity(alpha=4, beta=8, base=0.5)
    value, weight = loss.of_anchors(pairs)
    # Positives at the base and .25 below, negatives at the base and .25 above.
    wanted = math.log(1 + 1 + math.e) / 4 + math.log(1 + 1 + math.e**2) / 8
    assert value.item() == pytest.approx(wanted, rel=1e-14)
    assert weight.tolist() == [1]
    # The nearest negative, .75, is above both positives; the least positive .25 below both others.
    mined = MultiSimilarity(4, 8, 0.5, epsilon=0.0).of_anchors(pairs)
    assert mined.values.item() == pytest.approx(wanted, rel=1e-14)
    # With -.3 slack, only the positive at .25 and the negative at .75 stay.
    mined = MultiSimilarity(4, 8, 0.5, epsilon=-0.3).of_anchors(pairs)
    wanted = math.log(1 + math.e) / 4 + math.log(1 + math.e**2) / 8
    assert mined.values.item() == pytest.approx(wanted, rel=1e-14)


# Anomaly detection says that it slows things down.
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    ("labels", "wanted", "weight"),
    [
        ([0, 1, 1], math.log(3) / 40, 1),
        ([0, 0, 0], math.log(3) / 2, 1),
        ([0, -1, -1], 0, 0),
        ([-1, 0, 1], 0, 0),
    ],
    ids=["no positive", "no negative", "others ignored", "ignored"],
)
def test_anchors_that_lack_a_kind_of_pair_have_the_others_term_and_no_gradient_that_is_nan(
    labels: list[int], wanted: float, weight: int
) -> None:
    pairs = one_anchor([1.0, 0.5, 0.5], labels)
    values = pairs.values.requires_grad_()
    with torch.autograd.detect_anomaly():
        value, weights = MultiSimilarity().of_anchors(pairs)
        (gradient,) = torch.autograd.grad(value.sum(), values)
    assert value.item() == pytest.approx(wanted, abs=1e-15)
    assert weights.tolist() == [weight]
    assert gradient.isfinite().all()
    assert gradient[0, 0] == 0
    mined = MultiSimilarity(epsilon=0.1).of_anchors(pairs)
    assert [part.tolist() for part in mined] == [[0], [weight]]


def test_it_is_finite_at_exponents_of_1e4() -> None:
    values = torch.tensor([[1.0, -1.0, 1.0]], requires_grad=True)
    labels, own = torch.tensor([0, 0, 1]), torch.arange(1)
    pairs = pairs_of(values, labels[own], labels, own, -1)
    value, _ = MultiSimilarity(1e4, 1e4, 0.5).of_anchors(pairs)
    value.sum().backward()
    assert value.item() == pytest.approx(2.0, rel=1e-6)
    assert values.grad is not None
    assert values.grad.tolist() == [[0, -1, 1]]


def test_gradients_of_the_values_by_differences() -> None:
    rows, labels = batch(0)
    unit, own = F.normalize(rows.detach()), torch.arange(N)
    cosines = (unit @ unit.mT).requires_grad_()

    def values(cosines: Tensor) -> Tensor:
        pairs = pairs_of(cosines, labels, labels, own, -1)
        return MultiSimilarity(2, 10, 0.5).of_anchors(pairs).values

    assert torch.autograd.gradcheck(values, cosines)


def test_it_is_a_pair_loss() -> None:
    assert isinstance(MultiSimilarity(), PairLoss)


def test_a_sharpness_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match=r"got beta 0, expected a number above 0"):
        MultiSimilarity(beta=0)
