"""Torch operations on one tile of classes: its logits and its contribution to the gradients.

The backend of every loss, dtype and device, and the reference of the kernels. Two similarities
between a row `z` and a class weight `w_j`, told apart by `scale`:

- linear, `scale=None`: s_j = z . w_j + b_j;
- cosine: s_j = scale * z . w_j / |w_j| for rows of unit length. The division is a factor of the
  column, so no normalised copy of the weights exists.

A class may have K centres, whose rows of weights follow each other: class, then centre. Buffers are
made once a sweep (`TileSpace`), none a tile.

Dimensions: R rows of all workers, r rows of a chunk, c classes of this worker, n of them that take
part, t classes of a tile, K centres of a class, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.parallel.class_sweeps import SMALLEST_NORM

# Fewer classes a tile than this make the matrix products too thin to be worth running.
_FEWEST_TILE_CLASSES = 16


@dataclass(frozen=True)
class ClassShard:
    """One worker's class weights.

    Attributes:
        weight: (c * K, D); bfloat16 weights are widened tile by tile.
        bias: (c,) or None.
        scale: factor of cosines, or None for inner products.
        centres: K; with a bias it is 1.
        split: whether kernels may split float32 operands, see `KernelClasses.split_operands`.
        tile_dtype: dtype of the operands of the matrix products, if not the rows'. Products are
            accumulated in float32; everything else is in the rows' dtype.
        active: (n,) local ids of the classes that take part, ascending, for K = 1; None: all c.
        correction: (n,) added to the logits of those, or None.
    """

    weight: Float[Tensor, "cK D"]
    bias: Float[Tensor, " c"] | None = None
    scale: float | None = None
    centres: int = 1
    tile_dtype: torch.dtype | None = None
    split: bool = False
    active: Int[Tensor, " n"] | None = None
    correction: Float[Tensor, " n"] | None = None

    @property
    def num_classes(self) -> int:
        """n."""
        return len(self.weight) // self.centres if self.active is None else len(self.active)

    def classes(self, start: int, stop: int) -> slice | Int[Tensor, " t"]:
        """Local ids of the classes `start..stop-1` of those that take part."""
        return slice(start, stop) if self.active is None else self.active[start:stop]

    def rows(self, start: int, stop: int) -> slice | Int[Tensor, " t"]:
        """Their rows of weights."""
        if self.active is not None:
            return self.active[start:stop]
        return slice(start * self.centres, stop * self.centres)


def tile_bounds(num_classes: int, tile_classes: int) -> Iterator[tuple[int, int]]:
    """Start and stop of consecutive tiles of `num_classes` classes."""
    for start in range(0, num_classes, tile_classes):
        yield start, min(start + tile_classes, num_classes)


@dataclass(frozen=True)
class TileDemand:
    """What a sweep holds besides weights and state, in numbers of the rows' dtype.

    Attributes:
        num_rows: R, of all micro-batches that are held.
        chunk_rows: r, rows that a tile takes at a time.
        num_features: D.
        centres: K.
        buffers: buffers of r x t numbers beside the logits, while the loss works on a tile.
        row_numbers: statistics of a row; merging holds several copies.
        rounded: whether the matrix products' operands and results are copies of half the size.
        copied: whether a tile of weights is copied (bfloat16 weights, active classes).
        update_numbers: numbers for each of a tile's weights, while it is updated.
    """

    num_rows: int
    chunk_rows: int
    num_features: int
    centres: int = 1
    buffers: float = 0.0
    row_numbers: int = 6
    rounded: bool = False
    copied: bool = False
    update_numbers: float = 1.0

    def of_rows(self) -> int:
        """Gathered and padded rows, their gradient and its reduction, statistics."""
        return self.num_rows * (6 * self.num_features + 8 * self.row_numbers + 8)

    def of_class(self) -> float:
        """One class's logits, weight gradient and copies, and what loss or update hold besides.

        The last two never at the same time.
        """
        width = self.num_features
        own = self.chunk_rows + 8 + width * (1.0 + self.copied)
        if self.rounded:
            own += (self.chunk_rows + width) / 2 + width / 2
        passing = max(self.chunk_rows * self.buffers, self.update_numbers * width * self.centres)
        return own * self.centres + passing


def tile_classes_within(tile_bytes: int, demand: TileDemand, element_size: int) -> int:
    """The largest tile whose sweep stays within `tile_bytes`.

    Raises:
        UsageError: if not even a small tile fits; the message says how much would.
    """
    rows = demand.of_rows() * element_size
    per_class = demand.of_class() * element_size
    tile_classes = int((tile_bytes - rows) / per_class)
    if tile_classes < _FEWEST_TILE_CLASSES:
        needed = max(0.1, (rows + _FEWEST_TILE_CLASSES * per_class) / 2**20)
        raise UsageError(
            f"loss.tile_mebibytes={tile_bytes / 2**20:.3g} is too small for {demand.num_rows} rows "
            f"of {demand.num_features} features; set it to {needed:.1f} or more, or lower "
            "data.batch_size"
        )
    return tile_classes


class TileSpace:
    """Buffers of one sweep, for tiles of up to `tile` classes and chunks of up to `chunk` rows.

    Args:
        rows: of the sweep; their dtype is that of all arithmetic.
        shard: the classes.
        tile: t.
        chunk: r.
        with_gradient: whether weights' gradients are wanted.
    """

    def __init__(
        self,
        rows: Float[Tensor, "R D"],
        shard: ClassShard,
        tile: int,
        chunk: int,
        with_gradient: bool,
    ) -> None:
        width, columns = rows.shape[1], tile * shard.centres
        self.shard, self.tile, self.chunk = shard, tile, chunk
        self.logits = rows.new_empty(chunk * columns)
        self.gradient = rows.new_empty(columns, width) if with_gradient else None
        copied = shard.active is not None or shard.weight.dtype != rows.dtype
        self.weight = rows.new_empty(columns, width) if copied else None
        dtype = shard.tile_dtype
        self.rounded = dtype is not None and dtype != rows.dtype
        if self.rounded:
            self.weight16 = rows.new_empty(columns, width, dtype=dtype)
            self.logits16 = rows.new_empty(chunk * columns, dtype=dtype)
            self.product16 = rows.new_empty(max(chunk, columns), width, dtype=dtype)
            self.rows16 = rows.to(dtype)


@dataclass(frozen=True)
class Tile:
    """One tile of weights, as the products take it.

    Attributes:
        start: first of the classes that take part; `stop` the one after the last.
        weight: (t * K, D) in the rows' dtype.
        weight16: the same in the products' dtype, if that is another.
        factors: (t * K,) scale / |w| of cosines.
    """

    start: int
    stop: int
    weight: Float[Tensor, "tK D"]
    weight16: Tensor | None
    factors: Float[Tensor, " tK"] | None


def load_tile(space: TileSpace, start: int, stop: int) -> Tile:
    """Weights of classes `start..stop-1` of those that take part."""
    shard = space.shard
    own = shard.rows(start, stop)
    weight = shard.weight[own]
    if space.weight is not None:
        weight = space.weight[: len(weight)].copy_(weight)
    weight16 = None
    if space.rounded:
        weight16 = space.weight16[: len(weight)].copy_(weight)
    factors = None
    if shard.scale is not None:
        factors = shard.scale / torch.linalg.vector_norm(weight, dim=1).clamp_min(SMALLEST_NORM)
    return Tile(start, stop, weight, weight16, factors)


def tile_logits(
    space: TileSpace, tile: Tile, rows: Float[Tensor, "R D"], chunk: slice, out: Tensor
) -> Float[Tensor, "r tK"]:
    """The logits of a chunk of rows, written into `out` (flat, r * t * K numbers or more).

    Class by class, and within a class centre by centre.
    """
    shard, own = space.shard, rows[chunk]
    logits = out[: len(own) * len(tile.weight)].view(len(own), len(tile.weight))
    if tile.weight16 is None:
        torch.mm(own, tile.weight.T, out=logits)
    elif own.is_cuda:
        torch.mm(space.rows16[chunk], tile.weight16.T, out_dtype=logits.dtype, out=logits)
    else:  # A CPU's product rounds its float32 sums once, at the end.
        rounded = space.logits16[: logits.numel()].view_as(logits)
        logits.copy_(torch.mm(space.rows16[chunk], tile.weight16.T, out=rounded))
    if shard.bias is not None:
        logits.add_(shard.bias[shard.classes(tile.start, tile.stop)])
    if tile.factors is not None:
        logits.mul_(tile.factors)
    if shard.correction is not None:
        logits.add_(shard.correction[tile.start : tile.stop])
    return logits


def add_row_gradient_(
    space: TileSpace,
    tile: Tile,
    logit_gradient: Float[Tensor, "r tK"],
    row_gradient: Float[Tensor, "r D"],
) -> None:
    """Add a tile's part, G f w with G = dL/ds times the columns' factors, to `row_gradient`."""
    if tile.weight16 is None:
        row_gradient.addmm_(logit_gradient, tile.weight)
        return
    rounded = space.logits16[: logit_gradient.numel()].view_as(logit_gradient)
    rounded.copy_(logit_gradient)
    if rounded.is_cuda:
        part = torch.mm(rounded, tile.weight16, out_dtype=row_gradient.dtype)
    else:
        part = torch.mm(rounded, tile.weight16, out=space.product16[: len(row_gradient)])
    row_gradient.add_(part)


def add_weight_gradient_(
    space: TileSpace,
    logit_gradient: Float[Tensor, "r tK"],
    rows: Float[Tensor, "R D"],
    chunk: slice,
    is_first: bool,
) -> None:
    """Add G^T z of a chunk of rows to the space's gradient, or start it anew."""
    assert space.gradient is not None
    target = space.gradient[: logit_gradient.shape[1]]
    if not space.rounded:
        if is_first:
            torch.mm(logit_gradient.T, rows[chunk], out=target)
        else:
            target.addmm_(logit_gradient.T, rows[chunk])
        return
    rounded = space.logits16[: logit_gradient.numel()].view_as(logit_gradient)
    rounded.copy_(logit_gradient)
    if rounded.is_cuda:
        part = torch.mm(rounded.T, space.rows16[chunk], out_dtype=target.dtype)
    else:
        part = torch.mm(rounded.T, space.rows16[chunk], out=space.product16[: len(target)])
    if is_first:
        target.copy_(part)
    else:
        target.add_(part)


def project_(gradient: Float[Tensor, "tK D"], tile: Tile) -> None:
    """From f a to the gradient by w of a cosine: f (a - (a . w) w / |w|^2), in place.

    The derivative of w / |w|, applied to a = G^T z.
    """
    square = torch.linalg.vector_norm(tile.weight, dim=1).clamp_min(SMALLEST_NORM).square()
    along = torch.linalg.vecdot(gradient, tile.weight) / square
    gradient.addcmul_(tile.weight, along[:, None], value=-1)
