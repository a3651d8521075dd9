"""FastAP against numbers worked by hand, pulses from the formula, and pytorch-metric-learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import FastAPLoss
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.fastap import FastAP
from dist_dml.losses.pairs import AnchorLoss, Pairs, compare, pairs_of

IGNORED = -1


def features_and_labels(rows: int = 14, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(rows, 5, generator=generator, dtype=torch.float64))
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[0] = classes  # A row without positives.
    return features, labels


def of_block(loss: FastAP, rows: Tensor, labels: Tensor, own: Tensor) -> AnchorLoss:
    values = compare(rows[own], rows, loss.comparison)
    return loss.of_anchors(pairs_of(values, labels[own], labels, own, IGNORED))


def of_batch(loss: FastAP, rows: Tensor, labels: Tensor) -> Tensor:
    values, weights = of_block(loss, rows, labels, torch.arange(len(rows)))
    return values.sum() / weights.sum().clamp_min(1)


def fastap_by_pulses(pairs: Pairs, bins: int) -> Tensor:
    """Eq. 37 anchor by anchor, with a triangular pulse about each centre."""
    width, losses = 4 / bins, []
    for cosines, same, other in zip(pairs.values, pairs.same, pairs.other, strict=True):
        average, below, below_of_all = 0.0, 0.0, 0.0
        for number in range(bins + 1):
            here = [0.0, 0.0]
            for cosine, mine, foreign in zip(cosines, same, other, strict=True):
                pulse = max(0.0, 1 - abs(float(2 - 2 * cosine) - number * width) / width)
                here[0] += pulse * bool(mine)
                here[1] += pulse * bool(foreign)
            below += here[0]
            below_of_all += here[0] + here[1]
            average += here[0] * below / below_of_all if below_of_all else 0.0
        losses.append(1 - average / int(same.sum()) if same.any() else 0.0)
    return torch.tensor(losses, dtype=torch.float64)


def test_fastap_of_a_ranking_is_worked_by_hand() -> None:
    """Squared distances 1 and 3 of positives, 1 and 2 of negatives, in centres 0, 1, 2, 3, 4.

    h+ = 0 1 0 1 0, H+ = 0 1 1 2 2, H = 0 2 3 4 4: 1/2 (1/2 + 2/4) = 1/2.
    """
    cosines = 1 - torch.tensor([[0.0, 1, 3, 1, 2]], dtype=torch.float64) / 2
    same = torch.tensor([[False, True, True, False, False]])
    other = torch.tensor([[False, False, False, True, True]])
    values, weights = FastAP(bins=4).of_anchors(Pairs(cosines, same, other))
    torch.testing.assert_close(values, torch.tensor([0.5], dtype=torch.float64))
    assert weights.tolist() == [1]


@pytest.mark.parametrize("bins", [1, 3, 10, 25])
def test_fastap_equals_the_sum_over_pulses(bins: int) -> None:
    rows, labels = features_and_labels()
    own = torch.arange(len(rows))
    pairs = pairs_of(rows @ rows.T, labels, labels, own, IGNORED)
    values, weights = FastAP(bins).of_anchors(pairs)
    torch.testing.assert_close(values, fastap_by_pulses(pairs, bins))
    torch.testing.assert_close(weights, pairs.same.any(1).double())


@pytest.mark.parametrize("bins", [2, 10])
def test_fastap_and_its_gradient_equal_pytorch_metric_learning(bins: int) -> None:
    rows, labels = features_and_labels()
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    value = of_batch(FastAP(bins), F.normalize(ours), labels)
    wanted = FastAPLoss(num_bins=bins)(theirs, labels)
    torch.testing.assert_close(value, wanted)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_fastap_in_blocks_equals_the_whole_batch() -> None:
    rows, labels = features_and_labels()
    loss = FastAP()
    whole = of_block(loss, rows, labels, torch.arange(len(rows)))
    blocks = [of_block(loss, rows, labels, own) for own in torch.arange(len(rows)).split(5)]
    for name in ("values", "weights"):
        torch.testing.assert_close(
            torch.cat([getattr(block, name) for block in blocks]), getattr(whole, name)
        )


def test_fastap_has_the_gradient_of_its_value() -> None:
    rows, labels = features_and_labels(rows=8, classes=2)
    leaf = rows.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: of_batch(FastAP(7), F.normalize(z), labels), (leaf,))


def test_fastap_is_finite_for_equal_opposite_and_lonely_rows() -> None:
    rows = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0], [0, 1]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, IGNORED])
    leaf = (rows * (1 + 1e-12)).requires_grad_()  # Cosines beyond 1, as rounding makes them.
    values, weights = of_block(FastAP(), leaf, labels, torch.arange(5))
    assert weights.tolist() == [1, 1, 1, 0, 0]
    assert values[3:].tolist() == [0, 0]
    # Of the first: positives at 0 and 4, a negative at 4: 1/2 (1 + 2/3).
    torch.testing.assert_close(values[0].item(), 1 - 5 / 6)
    values.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_fastap_refuses_no_bins_with_a_line() -> None:
    with pytest.raises(UsageError, match=r"^bins is 0, but .* set it to 10$"):
        FastAP(bins=0)
