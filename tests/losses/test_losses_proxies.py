"""Proxy-Anchor from tiles of classes, and SoftTriple's term on centres, against autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from dense_losses import centre_spread, proxy_anchor
from torch import Tensor

from dist_dml.losses.proxies import CentreSpread, ProxyAnchor
from dist_dml.losses.softmax import TileTarget

R, C, SCALE, MARGIN = 11, 23, 16.0, 0.1
TILINGS = [(0, C), (0, 12, C), tuple(range(C + 1)), (0, 11, 22, C)]
# One class has several rows, most have none; all rows of one class; every row another class.
LABELS = {
    "mixed": [0, C - 1, 3, 3, 3, 7, 8, 9, 9, 1, 0],
    "one class": [5] * R,
    "all different": list(range(R)),
}


def in_tiles(
    loss: ProxyAnchor, logits: Tensor, labels: Tensor, bounds: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    def tiles() -> list[tuple[Tensor, TileTarget]]:
        pairs = itertools.pairwise(bounds)
        return [(logits[:, a:b].clone(), TileTarget.of(labels, a, b)) for a, b in pairs]

    sums = torch.stack([loss.tile_sums(*tile) for tile in tiles()]).sum(0)
    gradients = []
    for tile, target in tiles():
        loss.gradient_(tile, target, sums, torch.tensor(1.0, dtype=logits.dtype))
        gradients.append(tile)
    return loss.value(sums), torch.cat(gradients, dim=1)


@pytest.mark.parametrize("bounds", TILINGS, ids=["whole", "halves", "single classes", "thin last"])
@pytest.mark.parametrize("kind", LABELS)
def test_proxy_anchor_of_tiles_equals_the_paper_class_by_class(
    kind: str, bounds: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    cosines = 2 * torch.rand(R, C, generator=generator, dtype=torch.float64) - 1
    labels = torch.tensor(LABELS[kind])
    leaf = cosines.clone().requires_grad_()
    wanted = proxy_anchor(leaf, labels, SCALE, MARGIN)
    wanted.backward()
    loss = ProxyAnchor(C, SCALE * MARGIN)
    value, gradient = in_tiles(loss, SCALE * cosines, labels, bounds)
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-13, atol=0)
    assert leaf.grad is not None
    torch.testing.assert_close(gradient * SCALE, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rows", [1, R])
def test_proxy_anchor_is_finite_at_logits_of_1e4(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 1e4 * (2 * torch.rand(rows, C, generator=generator) - 1)
    logits[0] = 1e4
    labels = torch.tensor(LABELS["mixed"][:rows])
    loss = ProxyAnchor(C, 1e3)
    value, gradient = in_tiles(loss, logits, labels, (0, 11, 22, C))
    assert value.isfinite()
    assert gradient.isfinite().all()
    # Linear there: the pull of the worst own row, the push of the worst other row of each class.
    hidden = logits.clone()
    hidden[torch.arange(rows), labels] = float("-inf")
    push = (hidden.amax(0) + 1e3).clamp_min(0).mean()
    own = {y: logits[labels == y, y].min() for y in labels.tolist()}
    pull = torch.stack([(1e3 - s).clamp_min(0) for s in own.values()]).mean()
    torch.testing.assert_close(value, push + pull, rtol=1e-4, atol=1e-3)


def test_a_batch_without_rows_of_a_tiles_classes_pulls_nothing_there() -> None:
    logits = torch.zeros(2, 6, dtype=torch.float64)
    target = TileTarget.of(torch.tensor([0, 1]), 3, 6)
    pull, _, present = ProxyAnchor(6, 1.0).tile_sums(logits[:, 3:].clone(), target)
    assert pull == 0
    assert present == 0


@pytest.mark.parametrize("centres", [2, 5])
def test_the_centres_term_and_its_gradient_equal_autograd(centres: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(C, centres, 4, generator=generator, dtype=torch.float64)
    weight[0, 1] = 2 * weight[0, 0]  # Merged: the root of 1e-5 keeps a derivative.
    leaf = weight.clone().requires_grad_()
    wanted = centre_spread(leaf, 0.2)
    wanted.backward()
    term = CentreSpread(C, 0.2)
    parts = torch.stack([term.value(weight[a:b]) for a, b in ((0, 9), (9, C))])
    torch.testing.assert_close(parts.sum(), wanted.detach(), rtol=1e-12, atol=0)
    gradient = torch.cat([term.gradient(weight[a:b]) for a, b in ((0, 9), (9, C))])
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-15)


def test_the_centres_term_is_finite_where_centres_merge_or_vanish() -> None:
    weight = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    weight[0, 1] = weight[0, 0]
    weight[1] = 0.0  # loss.init_std=0.
    weight[2] *= 1e-20
    term = CentreSpread(4, 0.2)
    assert term.value(weight).isfinite()
    assert term.gradient(weight).isfinite().all()
