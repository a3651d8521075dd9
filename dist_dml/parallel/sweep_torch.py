"""Reference backend of a sweep: one tile of logits, and its contribution to the gradients.

Two similarities between a row `z` and a class weight `w_j`, told apart by `scale`:

- linear, `scale=None`: s_j = z . w_j + b_j;
- cosine: s_j = scale * z . w_j / |w_j| for rows of unit length. The division is a factor of the
  column, so no normalised copy of the weights exists.

Dimensions: R rows of all workers, c classes of this worker, t classes of a tile, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dist_dml.errors import UsageError

# Below this norm a class weight has no direction; dividing by the floor keeps everything finite.
_SMALLEST_NORM = 1e-12
# Fewer classes a tile than this make the matrix products too thin to be worth running.
_FEWEST_TILE_CLASSES = 16


@dataclass(frozen=True)
class ClassShard:
    """One worker's class weights, with their gradients, which backward sweeps write in place.

    Attributes:
        weight: (c, D), `weight_gradient` of the same shape.
        bias: (c,) or None, with `bias_gradient`.
        scale: factor of cosines, or None for inner products.
    """

    weight: Float[Tensor, "c D"]
    weight_gradient: Float[Tensor, "c D"] | None
    bias: Float[Tensor, " c"] | None = None
    bias_gradient: Float[Tensor, " c"] | None = None
    scale: float | None = None


def tile_bounds(num_classes: int, tile_classes: int) -> Iterator[tuple[int, int]]:
    """Start and stop of consecutive tiles of `num_classes` classes."""
    for start in range(0, num_classes, tile_classes):
        yield start, min(start + tile_classes, num_classes)


def tile_classes_within(
    tile_bytes: int, num_rows: int, num_features: int, element_size: int
) -> int:
    """The largest tile whose sweep stays within `tile_bytes` beyond inputs, gradients and state.

    Counts what a sweep holds besides its tiles (gathered and padded rows, their gradient and its
    reduction, statistics of a row) and for each class of a tile one column of logits and, for
    cosines, one row of weight gradient before its projection and one product of the same shape.

    Raises:
        UsageError: if not even a small tile fits; the message says how much would.
    """
    rows = num_rows * (6 * num_features + 32) * element_size
    per_class = (num_rows + 2 * num_features + 8) * element_size
    tile_classes = (tile_bytes - rows) // per_class
    if tile_classes < _FEWEST_TILE_CLASSES:
        needed = (rows + _FEWEST_TILE_CLASSES * per_class) / 2**20
        raise UsageError(
            f"loss.tile_mebibytes={tile_bytes / 2**20:g} is too small for {num_rows} rows of "
            f"{num_features} features; set it to {needed:.1f} or more, or lower data.batch_size"
        )
    return tile_classes


def tile_logits(
    rows: Float[Tensor, "R D"], shard: ClassShard, start: int, stop: int, buffer: Tensor
) -> Float[Tensor, "R t"]:
    """The logits of local classes `start..stop-1`, written into `buffer` (flat, R * t or more)."""
    weight = shard.weight[start:stop]
    logits = buffer[: len(rows) * len(weight)].view(len(rows), len(weight))
    torch.mm(rows, weight.T, out=logits)
    if shard.bias is not None:
        logits.add_(shard.bias[start:stop])
    if shard.scale is not None:
        logits.mul_(_column_factors(weight, shard.scale))
    return logits


def _column_factors(weight: Float[Tensor, "t D"], scale: float) -> Float[Tensor, " t"]:
    return scale / torch.linalg.vector_norm(weight, dim=1).clamp_min(_SMALLEST_NORM)


def tile_gradient_(
    rows: Float[Tensor, "R D"],
    shard: ClassShard,
    start: int,
    stop: int,
    logit_gradient: Float[Tensor, "R t"],
    row_gradient: Float[Tensor, "R D"],
    accumulate: bool,
) -> None:
    """Add a tile's part to `row_gradient` and write, or add, the tile's own weight gradient.

    For cosines, with a = G^T z and f = scale / |w|: dw = f (a - (a . w) w / |w|^2), the derivative
    of w / |w| applied to f a. Overwrites `logit_gradient` (G) there.

    Args:
        accumulate: add to the gradients present (later micro-batches) instead of overwriting them.
    """
    weight = shard.weight[start:stop]
    if shard.scale is not None:
        logit_gradient.mul_(_column_factors(weight, shard.scale))
    row_gradient.addmm_(logit_gradient, weight)
    if shard.bias_gradient is not None:
        total = logit_gradient.sum(0)
        target = shard.bias_gradient[start:stop]
        target.add_(total) if accumulate else target.copy_(total)
    if shard.weight_gradient is None:
        return
    target = shard.weight_gradient[start:stop]
    if shard.scale is None:
        if accumulate:
            target.addmm_(logit_gradient.T, rows)
        else:
            torch.mm(logit_gradient.T, rows, out=target)
        return
    gradient = logit_gradient.T @ rows
    square = torch.linalg.vector_norm(weight, dim=1).clamp_min(_SMALLEST_NORM).square()
    along = torch.linalg.vecdot(gradient, weight) / square
    gradient.addcmul_(weight, along[:, None], value=-1)
    target.add_(gradient) if accumulate else target.copy_(gradient)
