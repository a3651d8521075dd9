"""Binary cross-entropy over classes against PyTorch's own over full rows of logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiled_losses import in_tiles
from torch import Tensor

from dist_dml.losses.binary import BinaryCrossEntropy, prior_bias

R, C = 9, 23


def problem(size: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = size * torch.randn(R, C, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, C, (R,), generator=generator)
    labels[:2] = torch.tensor([0, C - 1])
    return logits, labels


def twin(logits: Tensor, labels: Tensor) -> Tensor:
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(1)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("bounds", [(0, C), (0, 12, C), tuple(range(C + 1)), (0, 11, 22, C)])
def test_values_and_gradients_of_tiles_equal_autograd_over_full_rows(
    bounds: tuple[int, ...], size: float
) -> None:
    logits, labels = problem(size)
    upstream = torch.linspace(-1, 2, R, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    wanted = twin(leaf, labels)
    (wanted * upstream).sum().backward()
    got = in_tiles(BinaryCrossEntropy(), logits, labels, bounds, upstream)
    torch.testing.assert_close(got.values, wanted.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(got.gradient, leaf.grad, rtol=1e-12, atol=1e-15)
    assert torch.equal(got.correct, logits.argmax(1) == labels)


def test_float32_keeps_what_is_left_of_rows_that_are_right() -> None:
    # log(1 + e^s) - s of the label would be 0 here, and sigmoid(s) - 1 as well.
    logits = torch.full((1, 5), -40.0)
    logits[0, 2] = 30.0
    got = in_tiles(BinaryCrossEntropy(), logits, torch.tensor([2]), (0, 2, 5))
    left = math.exp(-30) + 4 * math.exp(-40)
    torch.testing.assert_close(got.values, torch.tensor([left]), rtol=1e-6, atol=0)
    wanted = torch.full((1, 5), math.exp(-40))
    wanted[0, 2] = -math.exp(-30)
    torch.testing.assert_close(got.gradient, wanted, rtol=1e-6, atol=0)


def test_the_prior_bias_starts_every_class_at_its_share() -> None:
    num_classes = 1_000_000
    logits = torch.full((1, num_classes), prior_bias(num_classes))
    value = in_tiles(BinaryCrossEntropy(), logits, torch.tensor([3])).values.item()
    # log(1 + C) of the label and (C - 1) log(1 + 1 / C), instead of C log 2 = 693,147.
    assert value == pytest.approx(1 + math.log(num_classes), rel=1e-6)
