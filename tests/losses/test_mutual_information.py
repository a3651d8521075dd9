"""Tightness and contrastive parts against loops, the oracle, and Lemma 1 as inequalities."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import MultiSimilarityLoss, NCALoss
from torch import Tensor

from dist_dml.losses.mutual_information import (
    Parts,
    center_parts,
    center_tightness_of,
    contrastive_parts,
    multi_similarity_contrastive_at_least,
    multi_similarity_parts,
    multi_similarity_tightness_at_least,
    snca_contrastive_at_least,
    snca_parts,
    snca_tightness_at_most,
    spread,
)
from dist_dml.losses.pairs import Comparison, Pairs, compare, pairs_of

IGNORED = -1
ALPHA, BETA, SIGMA = 2.0, 30.0, 0.25
ROUNDING = 1e-9


def all_pairs(rows: Tensor, labels: Tensor, comparison: Comparison) -> Pairs:
    own = torch.arange(len(rows))
    return pairs_of(compare(rows, rows, comparison), labels, labels, own, IGNORED)


def unit_rows(rows: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64))


ROWS, LABELS = unit_rows(8, 3), torch.tensor([0, 1, 0, 2, 1, 0, IGNORED, 1])  # 2 is alone.


def close(parts: Parts, tightness: list[float], contrastive: list[float]) -> None:
    wanted = torch.tensor([tightness, contrastive], dtype=torch.float64)
    torch.testing.assert_close(torch.stack((parts.tightness, parts.contrastive)), wanted)


def positives(i: int) -> list[int]:
    return [j for j in range(8) if j != i and LABELS[j] == LABELS[i] != IGNORED]


def negatives(i: int) -> list[int]:
    return [j for j in range(8) if LABELS[j] != LABELS[i] and IGNORED not in (LABELS[i], LABELS[j])]


def cosine(i: int, j: int) -> float:
    return float((ROWS[i] * ROWS[j]).sum())


def distance(i: int, j: int) -> float:
    return float((ROWS[i] - ROWS[j]).square().sum().sqrt())


def test_contrastive_parts_equal_their_double_sums() -> None:
    margin = 1.2
    parts = contrastive_parts(all_pairs(ROWS, LABELS, "squared_l2"), margin)
    pull = [sum(distance(i, j) ** 2 for j in positives(i)) for i in range(8)]
    push = [sum(max(0, margin - distance(i, j)) ** 2 for j in negatives(i)) for i in range(8)]
    close(parts, pull, push)
    assert parts.counted.tolist() == [1, 1, 1, 1, 1, 1, 0, 1]
    torch.testing.assert_close(parts.means()[0].item(), sum(pull) / 7)


def test_snca_parts_equal_their_sums_and_leave_out_rows_without_positives() -> None:
    parts = snca_parts(all_pairs(ROWS, LABELS, "cosine"), SIGMA)
    tightness, contrastive = [0.0] * 8, [0.0] * 8
    for i in (0, 1, 2, 4, 5, 7):
        near = [math.exp(cosine(i, j) / SIGMA) for j in positives(i)]
        far = [math.exp(cosine(i, j) / SIGMA) for j in negatives(i)]
        tightness[i], contrastive[i] = -math.log(sum(near)), math.log(sum(near) + sum(far))
    close(parts, tightness, contrastive)
    assert parts.counted.tolist() == [1, 1, 1, 0, 1, 1, 0, 1]


def test_multi_similarity_parts_equal_their_sums() -> None:
    margin = 0.5
    parts = multi_similarity_parts(all_pairs(ROWS, LABELS, "cosine"), ALPHA, BETA, margin)
    pull, push = [], []
    for i in range(8):
        near = [math.exp(-ALPHA * (cosine(i, j) - margin)) for j in positives(i)]
        far = [math.exp(BETA * (cosine(i, j) - margin)) for j in negatives(i)]
        pull.append(math.log(1 + sum(near)) / ALPHA)
        push.append(math.log(1 + sum(far)) / BETA)
    close(parts, pull, push)


def test_parts_of_snca_and_multi_similarity_add_to_the_losses_of_pytorch_metric_learning() -> None:
    rows, labels = unit_rows(9, 4), torch.arange(9) % 3
    pairs = all_pairs(rows, labels, "cosine")
    snca = NCALoss(softmax_scale=int(1 / SIGMA), distance=CosineSimilarity())
    torch.testing.assert_close(sum(snca_parts(pairs, SIGMA).means()), snca(rows, labels))
    ms = MultiSimilarityLoss(alpha=int(ALPHA), beta=int(BETA), base=0.4)
    parts = multi_similarity_parts(pairs, ALPHA, BETA, 0.4)
    torch.testing.assert_close(sum(parts.means()), ms(rows, labels))


def test_center_parts_are_the_distances_to_means_and_the_cross_entropy() -> None:
    rows, labels, logits = unit_rows(6, 3), torch.tensor([0, 0, 0, 1, 1, IGNORED]), unit_rows(6, 2)
    parts = center_parts(all_pairs(rows, labels, "squared_l2"), logits, labels)
    means = torch.stack((rows[:3].mean(0), rows[3:5].mean(0)))
    tightness, contrastive = parts.means()
    wanted = (rows[:5] - means[labels[:5]]).square().sum() / 2
    torch.testing.assert_close(5 * tightness, wanted)
    torch.testing.assert_close(contrastive, F.cross_entropy(logits[:5], labels[:5]))
    assert parts.contrastive[5] == 0


@pytest.mark.parametrize("name", ["contrastive", "snca", "multi_similarity"])
def test_parts_have_finite_gradients_with_equal_lonely_and_ignored_rows(name: str) -> None:
    leaf = torch.cat((ROWS, ROWS[:1])).requires_grad_()
    labels = torch.cat((LABELS, LABELS[:1]))
    cosines = all_pairs(leaf, labels, "cosine")
    parts = {
        "contrastive": lambda: contrastive_parts(all_pairs(leaf, labels, "squared_l2"), 1.0),
        "snca": lambda: snca_parts(cosines, SIGMA),
        "multi_similarity": lambda: multi_similarity_parts(cosines, ALPHA, BETA, 0.5),
    }[name]()
    tightness, contrastive = parts.means()
    (tightness + contrastive).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert leaf.grad[:6].abs().sum() > 0


@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(2, 4),
    size=st.integers(2, 5),
    width=st.integers(2, 6),
    tight=st.floats(0, 3),
    sigma=st.floats(0.05, 2),
    alpha=st.floats(0.1, 20),
    beta=st.floats(0.5, 50),
    seed=st.integers(0, 2**31),
)
def test_lemma_1_orders_the_parts_of_unit_rows_in_balanced_classes(
    classes: int,
    size: int,
    width: int,
    tight: float,
    sigma: float,
    alpha: float,
    beta: float,
    seed: int,
) -> None:
    labels = torch.arange(classes * size) % classes
    rows = F.normalize(
        tight * unit_rows(classes, width, seed)[labels] + unit_rows(classes * size, width, seed + 1)
    )
    squares, cosines = all_pairs(rows, labels, "squared_l2"), all_pairs(rows, labels, "cosine")
    tightness, _ = contrastive_parts(squares, 1.0).means()
    snca, snca_push = snca_parts(cosines, sigma).means()
    ms, _ = multi_similarity_parts(cosines, alpha, beta, 1.0).means()
    center, _ = center_parts(squares, unit_rows(len(rows), classes, 0), labels).means()

    assert snca <= snca_tightness_at_most(tightness, size, sigma) + ROUNDING
    assert ms >= multi_similarity_tightness_at_least(tightness, size, alpha) - ROUNDING
    torch.testing.assert_close(center, center_tightness_of(tightness, size))

    others, mean_spread = (classes - 1) * size, spread(squares).mean()
    assert snca_push >= snca_contrastive_at_least(mean_spread, others, sigma) - ROUNDING
    for margin in (0.5, 1.0):
        push = multi_similarity_parts(cosines, alpha, beta, margin).means()[1]
        bound = multi_similarity_contrastive_at_least(mean_spread, others, beta, margin)
        assert push >= bound - ROUNDING


def test_lemma_1_is_tight_where_jensen_is() -> None:
    """Classes that are points: all positives at distance 0, T = 0.

    T_SNCA = -1/sigma - log(size - 1), T_MS = log(size) / alpha: both bounds are reached.
    """
    rows, labels = unit_rows(3, 4).repeat(4, 1), torch.arange(12) % 3
    pairs = all_pairs(rows, labels, "cosine")
    zero = torch.zeros((), dtype=torch.float64)
    snca, _ = snca_parts(pairs, SIGMA).means()
    ms, _ = multi_similarity_parts(pairs, ALPHA, BETA, 1.0).means()
    torch.testing.assert_close(snca.item(), -1 / SIGMA - math.log(3))
    torch.testing.assert_close(ms.item(), math.log(4) / ALPHA)
    torch.testing.assert_close(snca, snca_tightness_at_most(zero, 4, SIGMA))
    torch.testing.assert_close(ms, multi_similarity_tightness_at_least(zero, 4, ALPHA))


def test_lemma_1_needs_unit_rows() -> None:
    """Rows twice as long, cosines for distances: D^2 grows by 4, and T_MS falls below its bound."""
    rows, labels = unit_rows(12, 4), torch.arange(12) % 3
    tightness, _ = contrastive_parts(all_pairs(2 * rows, labels, "squared_l2"), 1.0).means()
    ms, _ = multi_similarity_parts(all_pairs(rows, labels, "cosine"), ALPHA, BETA, 1.0).means()
    assert ms < multi_similarity_tightness_at_least(tightness, 4, ALPHA)
