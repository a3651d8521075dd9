"""The triplet loss and its minings against pytorch-metric-learning, a triple loop, and by hand."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import AnchorLoss, PairLoss, Pairs, compare, pairs_of
from dist_dml.losses.triplet import Mining, Triplet

MINERS: dict[str, Any] = {
    "all": lambda margin, distance: None,
    "semihard": lambda margin, distance: miners.TripletMarginMiner(
        margin, "semihard", distance=distance
    ),
    "batch_hard": lambda margin, distance: miners.BatchHardMiner(distance=distance),
    "easy_positive": lambda margin, distance: miners.BatchEasyHardMiner(
        "easy", "hard", distance=distance
    ),
    "easy_positive_semihard": lambda margin, distance: miners.BatchEasyHardMiner(
        "easy", "semihard", distance=distance
    ),
}

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


def by_library(rows: Tensor, labels: Tensor, loss: Triplet, reducer: Any) -> Tensor:
    distance = {
        "l2": distances.LpDistance(),
        "squared_l2": distances.LpDistance(power=2),
        "cosine": distances.CosineSimilarity(),
    }[loss.comparison]
    miner = MINERS[loss.mining](loss.margin, distance)
    oracle = losses.TripletMarginLoss(loss.margin, distance=distance, reducer=reducer)
    return oracle(rows, labels, None if miner is None else miner(rows, labels))


def triple_loop(loss: Triplet, pairs: Pairs) -> AnchorLoss:
    """What the docstring says, one triplet after the other; for all and semi-hard ones."""
    values, weights = [], []
    for v, same, other in zip(pairs.values, pairs.same, pairs.other, strict=True):
        terms = []
        for p, n in itertools.product(same.nonzero()[:, 0], other.nonzero()[:, 0]):
            if loss.mining == "all" or v[p] < v[n] < v[p] + loss.margin:
                terms.append((v[p] + loss.margin - v[n]).clamp_min(0))
        above = sum(bool(term > 0) for term in terms)
        total = sum(terms, torch.zeros((), dtype=v.dtype))
        nonzero = loss.reduction == "nonzero"
        values.append(total if nonzero else total / max(len(terms), 1))
        weights.append(above if nonzero else int(same.any() and other.any()))
    return AnchorLoss(torch.stack(values), torch.tensor(weights, dtype=pairs.values.dtype))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("comparison", ["l2", "squared_l2", "cosine"])
@pytest.mark.parametrize("mining", get_args(Mining))
def test_over_triplets_above_zero_it_equals_the_library_as_it_comes(
    mining: Any, comparison: Any, seed: int
) -> None:
    rows, labels = batch(seed)
    loss = Triplet(0.4, mining, comparison, "nonzero")
    wanted = by_library(rows, labels, loss, reducers.AvgNonZeroReducer())
    assert_equal_with_gradient(loss_of(loss, rows, labels), wanted, rows)


@pytest.mark.parametrize("comparison", ["l2", "cosine"])
@pytest.mark.parametrize("mining", ["batch_hard", "easy_positive"])
def test_with_one_triplet_an_anchor_the_mean_over_anchors_is_the_librarys_mean(
    mining: Any, comparison: Any
) -> None:
    rows, labels = batch(0)
    loss = Triplet(0.1, mining, comparison)
    wanted = by_library(rows, labels, loss, reducers.MeanReducer())
    assert_equal_with_gradient(loss_of(loss, rows, labels), wanted, rows)


def test_with_classes_of_one_size_the_mean_over_anchors_is_the_librarys_mean() -> None:
    rows, _ = batch(0)
    labels = torch.arange(N) % 7
    wanted = by_library(rows, labels, Triplet(), reducers.MeanReducer())
    assert_equal_with_gradient(loss_of(Triplet(), rows, labels), wanted, rows)


@pytest.mark.parametrize("reduction", ["anchors", "nonzero"])
@pytest.mark.parametrize("mining", ["all", "semihard"])
def test_values_weights_and_gradients_are_those_of_a_loop_over_triplets(
    mining: Any, reduction: Any
) -> None:
    rows, labels = batch(1)
    labels[0] = -1
    unit = F.normalize(rows)
    pairs = pairs_of(compare(unit, unit, "l2"), labels, labels, torch.arange(N), -1)
    loss = Triplet(0.3, mining, "l2", reduction)
    ours, wanted = loss.of_anchors(pairs), triple_loop(loss, pairs)
    assert ours.weights.tolist() == wanted.weights.tolist()
    assert ours.values[0] == ours.weights[0] == 0
    upstream = torch.linspace(0.5, 2, N, dtype=torch.float64)
    torch.testing.assert_close(ours.values, wanted.values, rtol=1e-12, atol=1e-14)
    assert_equal_with_gradient(
        (ours.values * upstream).sum(), (wanted.values * upstream).sum(), rows
    )


@pytest.mark.parametrize("reduction", ["anchors", "nonzero"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("margin", [0.0, 1e-20, 0.1, 0.3])
@pytest.mark.parametrize("mining", ["all", "semihard"])
def test_ties_and_margins_met_but_for_rounding_cost_rounding_only(
    mining: Any, margin: float, dtype: torch.dtype, reduction: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Tenths: many distances are equal, many differ by the margin up to the last bit.
    values = (torch.randint(0, 12, (N, N), generator=generator) / 10).to(dtype)
    labels = torch.tensor(LABELS)
    pairs = pairs_of(values, labels, labels, torch.arange(N), -1)
    loss = Triplet(margin, mining, "l2", reduction)
    ours, wanted = loss.of_anchors(pairs), triple_loop(loss, pairs)
    if reduction == "nonzero":
        assert ours.weights.tolist() == wanted.weights.tolist()
    atol = 1e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.values, wanted.values, rtol=0, atol=atol)


@pytest.mark.parametrize("reduction", ["anchors", "nonzero"])
@pytest.mark.parametrize("mining", get_args(Mining))
@pytest.mark.parametrize("bounds", [(0, 5, 9, N), tuple(range(N + 1))])
def test_blocks_of_anchors_put_together_are_the_whole(
    bounds: tuple[int, ...], mining: Any, reduction: Any
) -> None:
    rows, labels = batch(0)
    loss = Triplet(0.4, mining, "l2", reduction)
    wanted = loss_of(loss, rows, labels)
    assert_equal_with_gradient(loss_of(loss, rows, labels, bounds), wanted, rows)


@pytest.mark.parametrize("mining", get_args(Mining))
def test_ignored_rows_are_as_if_they_were_not_there(mining: Any) -> None:
    rows, labels = batch(2)
    kept = torch.arange(N) % 5 != 1
    loss = Triplet(0.4, mining)
    ours = loss_of(loss, rows, torch.where(kept, labels, -1))
    wanted = loss_of(loss, rows[kept], labels[kept], (0, int(kept.sum())))
    assert_equal_with_gradient(ours, wanted, rows)


def one_anchor(values: list[float], labels: list[int]) -> Pairs:
    """Of row 0."""
    of_all, own = torch.tensor(labels), torch.arange(1)
    return pairs_of(torch.tensor([values], dtype=torch.float64), of_all[own], of_all, own, -1)


@pytest.mark.parametrize(
    ("mining", "value", "mean", "weight"),
    [
        # Positives at 1 and 3, negatives at 2, 3.25 and 9; margin .5. Of the first, no triplet
        # costs; of the second, 1.5 and .25.
        ("all", 1.75, 1.75 / 6, 2),
        ("semihard", 0.25, 0.25, 1),
        ("batch_hard", 1.5, 1.5, 1),
        ("easy_positive", 0.0, 0.0, 0),
        ("easy_positive_semihard", 0.0, 0.0, 0),
    ],
)
def test_values_by_hand(mining: Any, value: float, mean: float, weight: int) -> None:
    pairs = one_anchor([0.0, 1.0, 3.0, 2.0, 3.25, 9.0], [0, 0, 0, 1, 2, 1])
    ours = Triplet(0.5, mining, "l2", "nonzero").of_anchors(pairs)
    assert (ours.values.item(), ours.weights.item()) == (value, weight)
    ours = Triplet(0.5, mining).of_anchors(pairs)
    assert (ours.values.item(), ours.weights.item()) == (mean, 1)


def test_an_easy_positive_goes_with_the_nearest_negative_or_the_nearest_one_behind_it() -> None:
    pairs = one_anchor([0.0, 1.0, 3.0, 0.5, 1.25, 9.0], [0, 0, 0, 1, 2, 1])
    assert Triplet(0.5, "easy_positive").of_anchors(pairs).values.item() == 1.0
    assert Triplet(0.5, "easy_positive_semihard").of_anchors(pairs).values.item() == 0.25


@pytest.mark.parametrize("reduction", ["anchors", "nonzero"])
@pytest.mark.parametrize("mining", get_args(Mining))
@pytest.mark.parametrize(
    "labels",
    [[0, 1, 1], [0, 0, 0], [0, -1, -1], [-1, 0, 1]],
    ids=["no positive", "no negative", "others ignored", "ignored"],
)
def test_anchors_that_lack_a_kind_of_pair_add_0_with_weight_and_gradient_0(
    labels: list[int], mining: Any, reduction: Any
) -> None:
    pairs = one_anchor([0.0, 1.0, 0.5], labels)
    values = pairs.values.requires_grad_()
    value, weight = Triplet(0.5, mining, "l2", reduction).of_anchors(pairs)
    assert value.tolist() == weight.tolist() == [0]
    (gradient,) = torch.autograd.grad(value.sum(), values)
    assert gradient.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("mining", ["all", "semihard"])
def test_all_triplets_take_a_few_buffers_of_the_blocks_size(mining: Any) -> None:
    m, rows = 16, 256
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(m, rows, generator=generator, requires_grad=True)
    labels = torch.arange(rows) % 8
    own = torch.arange(m)
    pairs = pairs_of(values, labels[own], labels, own, -1)
    with LiveBytes() as used:
        Triplet(0.2, mining).of_anchors(pairs).values.sum().backward()
    # Against about 28 for the triplets that there are, and 256 for a cube.
    assert used.peak < 9 * values.nbytes


def test_it_is_a_pair_loss() -> None:
    assert isinstance(Triplet(), PairLoss)


def test_a_negative_margin_is_refused() -> None:
    with pytest.raises(UsageError, match=r"got margin -0.1, expected a number of at least 0"):
        Triplet(-0.1)
