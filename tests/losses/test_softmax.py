"""Softmax cross-entropy from tiles against PyTorch's own over full rows of logits, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_dml.losses.cross_entropy import CrossEntropy
from dist_dml.losses.softmax import TileTarget

R, C = 9, 23
# Start and stop of tiles: one, several, single classes, thin at either end.
TILINGS = {
    "one tile": (0, C),
    "halves": (0, 12, C),
    "single classes": tuple(range(C + 1)),
    "a thin last tile": (0, 11, 22, C),
}
SMOOTHINGS = [0.0, 0.1, 0.9]


def problem(logit_size: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = logit_size * torch.randn(R, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (R,), generator=generator)
    # The ends of the range, where a tile's bounds are off by one first.
    labels[:2] = torch.tensor([0, C - 1])
    return logits, labels


def statistics_of(
    loss: CrossEntropy, logits: Tensor, labels: Tensor, bounds: tuple[int, ...]
) -> Tensor:
    merged: Tensor | None = None
    for start, stop in itertools.pairwise(bounds):
        target = TileTarget.of(labels, start, stop)
        part = loss.tile_statistics(logits[:, start:stop].clone(), target)
        merged = part if merged is None else loss.merge(torch.stack((merged, part)))
    assert merged is not None
    return merged


def gradient_of(
    loss: CrossEntropy,
    logits: Tensor,
    labels: Tensor,
    bounds: tuple[int, ...],
    statistics: Tensor,
    upstream: Tensor,
) -> Tensor:
    tiles = []
    for start, stop in itertools.pairwise(bounds):
        tile = logits[:, start:stop].clone()
        terms = loss.gradient_terms(statistics)
        loss.gradient_(tile, TileTarget.of(labels, start, stop), terms, upstream)
        tiles.append(tile)
    return torch.cat(tiles, dim=1)


def correct(loss: CrossEntropy, statistics: Tensor) -> Tensor:
    label, rival = loss.label_and_rival(statistics)
    return label > rival


def dense(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Paper B's smoothing in PyTorch's terms, which counts the label among those smoothed over."""
    share = smoothing * C / (C - 1)
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=share)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("tiling", TILINGS)
def test_values_and_gradients_of_tiles_equal_autograd_over_full_rows(
    tiling: str, smoothing: float
) -> None:
    logits, labels = problem()
    upstream = torch.linspace(-1, 2, R, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    wanted = dense(leaf, labels, smoothing)
    (wanted * upstream).sum().backward()
    loss = CrossEntropy(C, smoothing)
    statistics = statistics_of(loss, logits, labels, TILINGS[tiling])
    torch.testing.assert_close(loss.values(statistics), wanted.detach(), rtol=1e-13, atol=1e-13)
    gradient = gradient_of(loss, logits, labels, TILINGS[tiling], statistics, upstream)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(correct(loss, statistics), logits.argmax(1) == labels)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_the_gradient_rule_is_the_derivative_of_the_value(smoothing: float) -> None:
    # Central differences: a wrong rule that repeats an error of the twin would show here.
    logits, labels = problem()
    loss, bounds, step = CrossEntropy(C, smoothing), TILINGS["halves"], 1e-6
    statistics = statistics_of(loss, logits, labels, bounds)
    ones = torch.ones(R, dtype=torch.float64)
    gradient = gradient_of(loss, logits, labels, bounds, statistics, ones)
    for column in range(C):
        shift = torch.zeros(C, dtype=torch.float64)
        shift[column] = step
        above = loss.values(statistics_of(loss, logits + shift, labels, bounds))
        below = loss.values(statistics_of(loss, logits - shift, labels, bounds))
        torch.testing.assert_close(
            gradient[:, column], (above - below) / (2 * step), rtol=1e-6, atol=1e-8
        )
    # Raising all logits alike changes no probability.
    assert gradient.sum(1).abs().max() < 1e-14


def test_paper_bs_label_is_1_minus_e_for_the_class_and_e_over_c_minus_1_for_others() -> None:
    logits, labels = problem()
    target = torch.full((R, C), 0.3 / (C - 1), dtype=torch.float64)
    target[torch.arange(R), labels] = 0.7
    wanted = -(target * logits.log_softmax(1)).sum(1)
    loss = CrossEntropy(C, 0.3)
    got = loss.values(statistics_of(loss, logits, labels, TILINGS["halves"]))
    torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_a_tile_of_nothing_but_the_label_is_finite(smoothing: float) -> None:
    # Its rival is -inf, and in all other tiles the label's logit is -inf: no difference of both.
    logits, _ = problem()
    labels = torch.full((R,), 5)
    loss = CrossEntropy(C, smoothing)
    bounds = (0, 5, 6, C)
    statistics = statistics_of(loss, logits, labels, bounds)
    assert statistics.isfinite().all()
    torch.testing.assert_close(loss.values(statistics), dense(logits, labels, smoothing))
    alone = loss.tile_statistics(logits[:, 5:6].clone(), TileTarget.of(labels, 5, 6))
    elsewhere = loss.tile_statistics(logits[:, :5].clone(), TileTarget.of(labels, 0, 5))
    assert not alone.isnan().any()
    assert not elsewhere.isnan().any()
    for parts in ((alone, elsewhere), (elsewhere, alone)):
        merged = loss.merge(torch.stack(parts))
        assert merged.isfinite().all()
    # One class in all: certain, and no rival to be above.
    single = CrossEntropy(1)
    of_one = single.tile_statistics(logits[:, 5:6].clone(), TileTarget.of(labels * 0, 0, 1))
    assert single.values(of_one).abs().max() == 0
    assert correct(single, of_one).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_huge_logits_neither_overflow_nor_lose_the_loss(
    smoothing: float, dtype: torch.dtype
) -> None:
    logits, labels = problem(logit_size=1e4)
    logits += 3e4  # A common offset, which a plain sum of exponentials or of logits would not bear.
    logits = logits.to(dtype)
    loss, bounds = CrossEntropy(C, smoothing), TILINGS["a thin last tile"]
    statistics = statistics_of(loss, logits, labels, bounds)
    leaf = logits.double().requires_grad_()
    wanted = dense(leaf, labels, smoothing)
    wanted.sum().backward()
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    values = loss.values(statistics).double()
    torch.testing.assert_close(values, wanted.detach(), rtol=tolerance, atol=1e4 * tolerance)
    ones = torch.ones(R, dtype=dtype)
    gradient = gradient_of(loss, logits, labels, bounds, statistics, ones)
    assert gradient.isfinite().all()
    # exp turns the rounding of a logit of 6e4, 4e-3 in float32, into a relative error.
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=tolerance, atol=tolerance / 100)


def test_float32_is_as_near_to_float64_as_pytorchs_own_float32() -> None:
    logits, labels = problem(logit_size=30.0)
    wanted = dense(logits, labels, 0.1)
    single = logits.float()
    loss = CrossEntropy(C, 0.1)
    got = loss.values(statistics_of(loss, single, labels, TILINGS["single classes"]))
    own_error = (got.double() - wanted).abs().max()
    plain_error = (dense(single, labels, 0.1).double() - wanted).abs().max()
    assert own_error <= 2 * plain_error + 1e-6


def test_the_smoothing_term_keeps_its_digits_with_a_million_classes() -> None:
    # sum(s) and C * peak are 1e11 each, known to 1e4 in float32, and differ by 5e5.
    num_classes, tile = 1_000_000, 100_000
    generator = torch.Generator().manual_seed(0)
    logits = 1e5 + torch.rand(2, num_classes, generator=generator)
    labels = torch.tensor([7, num_classes - 1])
    loss = CrossEntropy(num_classes, 0.1)
    bounds = tuple(range(0, num_classes + 1, tile))
    got = loss.values(statistics_of(loss, logits, labels, bounds)).double()
    log_probabilities = logits.double().log_softmax(1)
    at_label = log_probabilities[torch.arange(2), labels]
    others = (log_probabilities.sum(1) - at_label) / (num_classes - 1)
    torch.testing.assert_close(got, -(0.9 * at_label + 0.1 * others), rtol=1e-6, atol=0)


def test_a_tie_with_a_rival_is_not_correct() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    labels = torch.tensor([0, 0, 0])
    loss = CrossEntropy(3)
    for bounds in ((0, 3), (0, 1, 3), (0, 2, 3)):
        assert correct(loss, statistics_of(loss, logits, labels, bounds)).tolist() == [
            False,
            True,
            False,
        ]


def test_the_target_lies_in_exactly_one_tile() -> None:
    labels = torch.tensor([0, 4, 5, 9])
    first, second = TileTarget.of(labels, 0, 5), TileTarget.of(labels, 5, 10)
    assert first.present.tolist() == [True, True, False, False]
    assert first.column.tolist() == [0, 4, 0, 0]
    assert second.present.tolist() == [False, False, True, True]
    assert second.column.tolist() == [0, 0, 0, 4]


def test_a_uniform_row_costs_the_logarithm_of_the_classes() -> None:
    loss = CrossEntropy(C)
    statistics = statistics_of(
        loss, torch.zeros(R, C), torch.arange(R), TILINGS["a thin last tile"]
    )
    torch.testing.assert_close(loss.values(statistics), torch.full((R,), math.log(C)))
