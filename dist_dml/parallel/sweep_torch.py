"""Reference backend of a sweep: one tile of logits, and its contribution to the gradients.

Two similarities between a row `z` and a class weight `w_j`, told apart by `scale`:

- linear, `scale=None`: s_j = z . w_j + b_j;
- cosine: s_j = scale * z . w_j / |w_j| for rows of unit length. The division is a factor of the
  column, so no normalised copy of the weights exists.

A class may have K centres, whose rows of weights follow each other: class, then centre.

Dimensions: R rows of all workers, c classes of this worker, t classes of a tile, K centres of a
class, D features.
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
        weight: (c * K, D), `weight_gradient` of the same shape.
        bias: (c,) or None, with `bias_gradient`.
        scale: factor of cosines, or None for inner products.
        centres: K; with a bias it is 1.
        tile_dtype: dtype of the operands of the matrix products, if not the weights'. Products are
            accumulated in float32; everything else is in the weights' dtype.
    """

    weight: Float[Tensor, "cK D"]
    weight_gradient: Float[Tensor, "cK D"] | None
    bias: Float[Tensor, " c"] | None = None
    bias_gradient: Float[Tensor, " c"] | None = None
    scale: float | None = None
    centres: int = 1
    tile_dtype: torch.dtype | None = None

    def rows(self, start: int, stop: int) -> slice:
        """The rows of weights of local classes `start..stop-1`."""
        return slice(start * self.centres, stop * self.centres)


def tile_bounds(num_classes: int, tile_classes: int) -> Iterator[tuple[int, int]]:
    """Start and stop of consecutive tiles of `num_classes` classes."""
    for start in range(0, num_classes, tile_classes):
        yield start, min(start + tile_classes, num_classes)


@dataclass(frozen=True)
class TileDemand:
    """What a sweep holds besides weights, gradients and state, in numbers of the rows' dtype.

    Attributes:
        num_rows: R.
        num_features: D.
        centres: K.
        buffers: buffers of R x t numbers beside the logits, while the loss works on a tile.
        row_numbers: statistics of a row; merging holds several copies.
        cosine: whether weight gradients are projected.
        rounded: whether the matrix products' operands and results are copies of half the size.
    """

    num_rows: int
    num_features: int
    centres: int = 1
    buffers: float = 0.0
    row_numbers: int = 6
    cosine: bool = True
    rounded: bool = False

    def of_rows(self) -> int:
        """Gathered and padded rows, their gradient and its reduction, statistics."""
        return self.num_rows * (6 * self.num_features + 8 * self.row_numbers + 8)

    def of_class(self) -> float:
        """One class's logits and the larger of what the loss and the products hold besides.

        Never both at a time. Products: rounded operands and results; a weight gradient before it is
        projected, and its product with the weights.
        """
        products = 0.0
        if self.rounded:
            products = (self.num_rows + self.num_features) / 2 + self.num_features
        if self.cosine:
            products = max(products, 2.0 * self.num_features)
        own = (self.num_rows + 8) * self.centres
        return own + max(self.num_rows * self.buffers, products * self.centres)


def tile_classes_within(tile_bytes: int, demand: TileDemand, element_size: int) -> int:
    """The largest tile whose sweep stays within `tile_bytes`.

    Raises:
        UsageError: if not even a small tile fits; the message says how much would.
    """
    rows = demand.of_rows() * element_size
    per_class = demand.of_class() * element_size
    tile_classes = int((tile_bytes - rows) / per_class)
    if tile_classes < _FEWEST_TILE_CLASSES:
        needed = (rows + _FEWEST_TILE_CLASSES * per_class) / 2**20
        raise UsageError(
            f"loss.tile_mebibytes={tile_bytes / 2**20:g} is too small for {demand.num_rows} rows "
            f"of {demand.num_features} features; set it to {needed:.1f} or more, or lower "
            "data.batch_size"
        )
    return tile_classes


def tile_logits(
    rows: Float[Tensor, "R D"], shard: ClassShard, start: int, stop: int, buffer: Tensor
) -> Float[Tensor, "R tK"]:
    """The logits of local classes `start..stop-1`, written into `buffer` (flat, R * t * K or more).

    Class by class, and within a class centre by centre.
    """
    weight = shard.weight[shard.rows(start, stop)]
    logits = buffer[: len(rows) * len(weight)].view(len(rows), len(weight))
    _product(rows, weight.T, shard.tile_dtype, logits)
    if shard.bias is not None:
        logits.add_(shard.bias[start:stop])
    if shard.scale is not None:
        logits.mul_(_column_factors(weight, shard.scale))
    return logits


def _product(left: Tensor, right: Tensor, dtype: torch.dtype | None, out: Tensor) -> None:
    """left @ right into `out`, from operands rounded to `dtype`.

    On CUDA the product keeps its float32 sums; on a CPU it rounds them to `dtype` once at the end.
    """
    if dtype is None or dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left.to(dtype), right.to(dtype), out_dtype=out.dtype, out=out)
    else:
        out.copy_(left.to(dtype) @ right.to(dtype))


def _column_factors(weight: Float[Tensor, "t D"], scale: float) -> Float[Tensor, " t"]:
    return scale / torch.linalg.vector_norm(weight, dim=1).clamp_min(_SMALLEST_NORM)


def tile_gradient_(
    rows: Float[Tensor, "R D"],
    shard: ClassShard,
    start: int,
    stop: int,
    logit_gradient: Float[Tensor, "R tK"],
    row_gradient: Float[Tensor, "R D"],
    accumulate: bool,
) -> None:
    """Add a tile's part to `row_gradient` and write, or add, the tile's own weight gradient.

    For cosines, with a = G^T z and f = scale / |w|: dw = f (a - (a . w) w / |w|^2), the derivative
    of w / |w| applied to f a. Overwrites `logit_gradient` (G) there.

    Args:
        accumulate: add to the gradients present (later micro-batches) instead of overwriting them.
    """
    weight = shard.weight[shard.rows(start, stop)]
    if shard.scale is not None:
        logit_gradient.mul_(_column_factors(weight, shard.scale))
    if shard.tile_dtype is None:
        row_gradient.addmm_(logit_gradient, weight)
    else:
        part = torch.empty_like(row_gradient)
        _product(logit_gradient, weight, shard.tile_dtype, part)
        row_gradient.add_(part)
    if shard.bias_gradient is not None:
        total = logit_gradient.sum(0)
        target = shard.bias_gradient[start:stop]
        target.add_(total) if accumulate else target.copy_(total)
    if shard.weight_gradient is None:
        return
    target = shard.weight_gradient[shard.rows(start, stop)]
    if shard.scale is None and not (accumulate and shard.tile_dtype):
        if accumulate:
            target.addmm_(logit_gradient.T, rows)
        else:
            _product(logit_gradient.T, rows, shard.tile_dtype, target)
        return
    gradient = torch.empty_like(weight)
    _product(logit_gradient.T, rows, shard.tile_dtype, gradient)
    if shard.scale is not None:
        square = torch.linalg.vector_norm(weight, dim=1).clamp_min(_SMALLEST_NORM).square()
        along = torch.linalg.vecdot(gradient, weight) / square
        gradient.addcmul_(weight, along[:, None], value=-1)
    target.add_(gradient) if accumulate else target.copy_(gradient)
