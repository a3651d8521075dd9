"""A row loss over tiles of given bounds, as the sweeps compute it, without workers."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from dist_dml.losses.softmax import RowLoss, TileTarget


class Tiled(NamedTuple):
    """Of each row (R,): the loss and whether it is right; the gradient by the logits (R, C * K)."""

    values: Tensor
    correct: Tensor
    gradient: Tensor


def in_tiles(
    loss: RowLoss,
    logits: Tensor,
    labels: Tensor,
    bounds: tuple[int, ...] = (),
    upstream: Tensor | None = None,
) -> Tiled:
    """The loss from tiles of classes `bounds[0]..bounds[1]-1` and so on; one tile without bounds.

    Logits (R, C * K) are class by class; upstream is 1 if it is not given.
    """
    centres = loss.centres
    bounds = bounds or (0, logits.shape[1] // centres)
    upstream = torch.ones_like(logits[:, 0]) if upstream is None else upstream

    def tiles() -> list[tuple[Tensor, TileTarget]]:
        return [
            (
                logits[:, start * centres : stop * centres].clone(),
                TileTarget.of(labels, start, stop),
            )
            for start, stop in itertools.pairwise(bounds)
        ]

    parts = [loss.tile_statistics(*tile) for tile in tiles()]
    # By twos from the left, so that merged statistics are merged again; all at once is the same.
    statistics = parts[0]
    for part in parts[1:]:
        statistics = loss.merge(torch.stack((statistics, part)))
    torch.testing.assert_close(loss.merge(torch.stack(parts)), statistics, rtol=1e-5, atol=1e-30)
    if loss.refined:
        refined = [loss.tile_refinement(*tile, statistics) for tile in tiles()]
        statistics = torch.cat((statistics, torch.stack(refined).sum(0)))
    label, rival = loss.label_and_rival(statistics)
    terms, gradients = loss.gradient_terms(statistics), []
    for tile, target in tiles():
        loss.gradient_(tile, target, terms, upstream)
        gradients.append(tile)
    return Tiled(loss.values(statistics), label > rival, torch.cat(gradients, dim=1))
