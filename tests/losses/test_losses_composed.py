"""Centres, priors, margins and class weights around a row loss, all at once, against autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from dense_losses import metric_loss
from tiled_losses import in_tiles
from torch import Tensor

from dist_dml.losses.binary import BinaryCrossEntropy
from dist_dml.losses.composed import ComposedLoss, LargestCentre, Pooling, SoftCentre
from dist_dml.losses.cross_entropy import CrossEntropy
from dist_dml.losses.margins import AngularMargin, ClassMargin
from dist_dml.losses.metric_softmax import MetricSoftmax
from dist_dml.losses.softmax import RowLoss
from dist_dml.metric_parameters import MetricParameters

R, C, K, SCALE = 9, 40, 3, 12.0
TILINGS = [(0, C), (0, 22, C), tuple(range(C + 1)), (0, 19, 38, C)]
Twin = Callable[[Tensor, Tensor], Tensor]


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="none")


def binary(logits: Tensor, labels: Tensor) -> Tensor:
    one_hot = F.one_hot(labels, C).double()
    return F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(1)


BASES: dict[str, tuple[RowLoss, Twin]] = {
    "cross-entropy": (CrossEntropy(C, 0.2, "all"), smoothed),
    "l2": (MetricSoftmax(MetricParameters(0.8, 0.5)), lambda x, y: metric_loss(x, y, 0.8, 0.5)),
    "binary": (BinaryCrossEntropy(), binary),
}
POOLINGS: dict[str, tuple[Pooling | None, Twin | None]] = {
    "one centre": (None, None),
    "largest": (LargestCentre(K), lambda x, _: x.max(2).values),
    "soft": (SoftCentre(K, 0.4), lambda x, _: ((0.4 * x).softmax(2) * x).sum(2)),
}


def problem(centres: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled cosines (R, C * K), labels, log-priors and class weights (C,)."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    cosines = 1.9 * uniform(R, C * centres) - 0.95
    labels = torch.randint(0, C, (R,), generator=generator)
    labels[:2] = torch.tensor([0, C - 1])
    return SCALE * cosines, labels, (uniform(C) + 0.01).log(), uniform(C) + 0.5


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bounds", TILINGS, ids=["whole", "halves", "single classes", "thin last"])
def test_all_parts_together_equal_autograd(
    bounds: tuple[int, ...], pooling: str, base: str
) -> None:
    loss, twin = BASES[base]
    pool, pool_twin = POOLINGS[pooling]
    logits, labels, log_prior, class_weight = problem(1 if pool is None else K)
    angles = torch.linspace(0, 1.2, C, dtype=torch.float64)
    parts = ComposedLoss(loss, SCALE, pool, ClassMargin(angles), log_prior, class_weight)
    upstream = torch.linspace(-1, 2, R, dtype=torch.float64)

    leaf = logits.clone().requires_grad_()
    classes = leaf if pool_twin is None else pool_twin(leaf.unflatten(1, (C, K)), labels)
    classes = classes + log_prior
    # A prior may push the label's "cosine" below -1, where its angle is pi.
    cosine, own = classes[torch.arange(R), labels] / SCALE, angles[labels]
    angle = torch.acos(cosine.clamp(-1 + 1e-14, 1 - 1e-14)) + own
    beyond = cosine.clamp(-1, 1) - own * own.sin()
    changed = SCALE * torch.where(angle > torch.pi, beyond, angle.cos())
    with_margin = torch.where(F.one_hot(labels, C) == 1, changed[:, None], classes)
    wanted = twin(with_margin, labels) * class_weight[labels]
    (wanted * upstream).sum().backward()

    got = in_tiles(parts, logits, labels, bounds, upstream)
    inside = cosine.detach().abs() < 1
    assert inside.sum() >= 7
    torch.testing.assert_close(got.values, wanted.detach(), rtol=1e-9, atol=0)
    assert leaf.grad is not None
    torch.testing.assert_close(got.gradient[inside], leaf.grad[inside], rtol=1e-9, atol=1e-13)
    assert torch.equal(got.correct, classes.argmax(1) == labels)


def test_whether_a_row_is_right_is_judged_without_the_margin() -> None:
    # The label leads by 0.1 of cosine, and loses with any margin.
    logits = SCALE * torch.tensor([[0.5, 0.4, 0.1], [0.4, 0.5, 0.1], [0.4, 0.4, 0.1]])
    labels = torch.zeros(3, dtype=torch.int64)
    for margin in (AngularMargin(cosine=0.4), AngularMargin(angle=1.0)):
        for bounds in ((0, 3), (0, 1, 3)):
            loss = ComposedLoss(CrossEntropy(3), SCALE, margin=margin)
            got = in_tiles(loss, logits, labels, bounds)
            assert got.correct.tolist() == [True, False, False]
            assert got.values[0] > 2  # With the margin it is wrong.


@pytest.mark.parametrize("pooling", [LargestCentre(K), SoftCentre(K, 3.0)])
def test_pooling_leaves_the_derivative_of_each_class_by_its_centres(pooling: Pooling) -> None:
    logits, _, _, _ = problem(K)
    leaf = logits.unflatten(1, (C, K)).clone().requires_grad_()
    shares = (3.0 * leaf).softmax(2)
    soft = isinstance(pooling, SoftCentre)
    twin = (shares * leaf).sum(2) if soft else leaf.max(2).values
    twin.sum().backward()
    derivative = logits.unflatten(1, (C, K)).clone()
    pooled = pooling.pool_(derivative)
    torch.testing.assert_close(pooled, twin.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(derivative, leaf.grad, rtol=1e-12, atol=1e-14)


def test_tied_centres_share_the_gradient() -> None:
    logits = torch.tensor([[[1.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, -1.0, -2.0]]])
    assert LargestCentre(3).pool_(logits).tolist() == [[1.0, 2.0, 0.0]]
    third = 1 / 3
    wanted = torch.tensor([[[0.5, 0.5, 0.0], [third, third, third], [1.0, 0.0, 0.0]]])
    torch.testing.assert_close(logits, wanted)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_of_1e4_stay_finite_in_float32(pooling: str, base: str) -> None:
    pool, _ = POOLINGS[pooling]
    logits, labels, log_prior, class_weight = problem(1 if pool is None else K)
    scale = 1e4
    logits = (logits / SCALE * scale).float()
    logits[0] = scale  # All classes at a cosine of 1, and of -1.
    logits[1] = -scale
    for margin in (AngularMargin(angle=0.5), AngularMargin(2.0, 0.3, 0.2)):
        parts = ComposedLoss(
            BASES[base][0], scale, pool, margin, log_prior.float(), class_weight.float()
        )
        got = in_tiles(parts, logits, labels, (0, 19, 38, C))
        assert got.values.isfinite().all()
        assert got.gradient.isfinite().all()
