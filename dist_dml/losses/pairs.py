"""The contract of losses of pairs: what an anchor loses against all rows of the batch.

A loss sees one block of anchors at a time, against every row, and returns a value and a weight for
each anchor; the loss of the batch is the sum of the values over the sum of the weights. So it can
be computed block by block in bounded memory, each anchor once in the group of workers, and equals
that of one process with the whole batch, for losses that average over terms above zero as well.

Dimensions: m anchors of a block, R rows that they are compared with (the whole batch, and what a
memory adds), D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Comparison = Literal["cosine", "inner", "squared_l2", "l2"]
"""What `Pairs.values` holds: cosines and inner products grow, distances fall with similarity."""


@dataclass(frozen=True)
class Pairs:
    """A block of anchors against all rows.

    Attributes:
        values: see `Comparison`.
        same: whether two different rows share a label. Never true for an anchor and itself.
        other: whether two rows have different labels. Neither is true where a row is ignored.
    """

    values: Float[Tensor, "m R"]
    same: Bool[Tensor, "m R"]
    other: Bool[Tensor, "m R"]


class AnchorLoss(NamedTuple):
    """What each anchor adds to the batch's loss, which is sum(values) / max(sum(weights), 1).

    Attributes:
        values: with gradient.
        weights: without; 1 for a mean over anchors, the number of terms for a mean over terms.
    """

    values: Float[Tensor, " m"]
    weights: Float[Tensor, " m"]


@runtime_checkable  # The tests execute all annotations.
class PairLoss(Protocol):
    """A loss of pairs; a frozen dataclass of its parameters."""

    @property
    def comparison(self) -> Comparison:
        """What it compares rows by."""
        ...

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        """The values and weights of a block. Differentiable in `pairs.values`; every operation is
        of the block's size at most, and what a miner chooses is chosen within an anchor's row.

        Called again for the same block in the backward: what is drawn must be keyed.
        """
        ...


def compare(
    anchors: Float[Tensor, "m D"], rows: Float[Tensor, "R D"], comparison: Comparison
) -> Float[Tensor, "m R"]:
    """The values of all pairs. Cosines are of rows as they come: normalise them before."""
    products = anchors @ rows.mT
    if comparison in ("cosine", "inner"):
        return products
    squares = (anchors * anchors).sum(1)[:, None] + (rows * rows).sum(1) - 2 * products
    squares = squares.clamp_min(0)
    if comparison == "squared_l2":
        return squares
    # The root has no gradient at 0: equal rows get none, as they have no direction to part in.
    return torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt() * (squares > 0)


def pairs_of(
    values: Float[Tensor, "m R"],
    anchor_labels: Int[Tensor, " m"],
    labels: Int[Tensor, " R"],
    own: Int[Tensor, " m"],
    ignored: int,
) -> Pairs:
    """The block's pairs.

    Args:
        values: from `compare`.
        anchor_labels: of the anchors.
        labels: of all rows.
        own: the place of each anchor among the rows.
        ignored: label of rows that take part in no pair.
    """
    counted = (anchor_labels != ignored)[:, None] & (labels != ignored)
    alike = anchor_labels[:, None] == labels
    itself = own[:, None] == torch.arange(len(labels), device=labels.device)
    return Pairs(values, counted & alike & ~itself, counted & ~alike)


@dataclass(frozen=True)
class LabelledPairs(Pairs):
    """Pairs for losses that must know which of the other rows share a class.

    Attributes:
        anchor_labels: of the anchors.
        labels: of all rows.
        ignored: label of rows that take part in no pair.
    """

    anchor_labels: Int[Tensor, " m"]
    labels: Int[Tensor, " R"]
    ignored: int


def labelled_pairs_of(
    values: Float[Tensor, "m R"],
    anchor_labels: Int[Tensor, " m"],
    labels: Int[Tensor, " R"],
    own: Int[Tensor, " m"],
    ignored: int,
) -> LabelledPairs:
    """As `pairs_of`, with the labels."""
    pairs = pairs_of(values, anchor_labels, labels, own, ignored)
    return LabelledPairs(values, pairs.same, pairs.other, anchor_labels, labels, ignored)
