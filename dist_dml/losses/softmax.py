"""What a softmax-like loss needs of its logits: row statistics, a value, a gradient rule.

A loss of this family never sees all classes of a row at once. It sees tiles of them, in any order
and on any worker, and says (`docs/ARCHITECTURE.md`, "The class-parallel loss"):

1. `tile_statistics`: a few numbers a row from one tile of logits,
2. `merge`: how the numbers of two disjoint sets of classes become those of their union; associative
   and commutative up to rounding, so that tiles and workers merge by the same rule,
3. `tile_refinement`, for losses that need the merged numbers of 1 before they can add up what their
   value needs (paper A's): further numbers a row, summed over tiles and workers,
4. `values`: the loss of each row from all these numbers,
5. `gradient_`: dL/ds of a tile from the tile's logits and `gradient_terms`, which depend on the row
   alone and are made once.

Dimensions: R rows, C classes of all workers, t classes of a tile, K centres of a class, k numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TileTarget:
    """Which classes a tile holds, and where each row's label lies in it, if it does.

    `column` (R,) is the label's column, 0 where the label is elsewhere; `present` (R,) tells which.
    Both keep the shape fixed, so that nothing waits for the device to count rows. `first_id` is the
    id of the tile's first class, `local` the tile's place in a vector over this worker's classes.
    A negative label is in no tile: its row is `absent` from losses that couple rows. Where only
    some classes take part, `local` holds their places.
    """

    column: Int[Tensor, " R"]
    present: Bool[Tensor, " R"]
    first_id: int
    local: slice | Int[Tensor, " t"]
    absent: Bool[Tensor, " R"] | None = None

    @staticmethod
    def of(labels: Int[Tensor, " R"], start: int, stop: int, first_class: int = 0) -> TileTarget:
        """The targets in the tile of class ids `start..stop-1`, on the owner of `first_class..`."""
        present = (labels >= start) & (labels < stop)
        local = slice(start - first_class, stop - first_class)
        column = torch.where(present, labels - start, 0)
        return TileTarget(column, present, start, local, labels < 0)

    def read(
        self, logits: Float[Tensor, "R t"], elsewhere: float = float("-inf")
    ) -> Float[Tensor, " R"]:
        """Each row's entry at its label, `elsewhere` for labels outside the tile."""
        return torch.where(self.present, logits.gather(1, self.column[:, None])[:, 0], elsewhere)

    def write_(self, logits_: Float[Tensor, "R t"], values: Float[Tensor, " R"] | float) -> None:
        """Overwrite the labels' entries; touches R elements, whatever the tile's size."""
        column = self.column[:, None]
        kept = logits_.gather(1, column)[:, 0]
        logits_.scatter_(1, column, torch.where(self.present, values, kept)[:, None])


@runtime_checkable  # The tests execute all annotations.
class RowLoss(Protocol):
    """A loss whose rows are independent of each other; see the module's text for its parts."""

    @property
    def centres(self) -> int:
        """K: columns of each class in the logits it is given, class by class."""
        ...

    @property
    def buffers(self) -> float:
        """Buffers of R x t numbers that it uses beside the logits, for the memory's budget."""
        ...

    @property
    def row_numbers(self) -> int:
        """k: numbers a row of its statistics, for the memory's budget."""
        ...

    @property
    def refined(self) -> bool:
        """Whether `tile_refinement` is needed: one more sweep, 2*R*c*D operations."""
        ...

    def tile_statistics(
        self, logits_: Float[Tensor, "R tK"], target: TileTarget
    ) -> Float[Tensor, "k R"]:
        """The statistics of one tile. Overwrites `logits_`, which saves a buffer of its size."""
        ...

    def merge(self, parts: Float[Tensor, "n k R"]) -> Float[Tensor, "k R"]:
        """The statistics of the union of n disjoint sets of classes."""
        ...

    def tile_refinement(
        self, logits_: Float[Tensor, "R tK"], target: TileTarget, statistics: Float[Tensor, "k R"]
    ) -> Float[Tensor, "m R"]:
        """Numbers that are summed over tiles and workers, and appended to the statistics."""
        ...

    def values(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, " R"]:
        """The loss of each row."""
        ...

    def label_and_rival(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, "2 R"]:
        """The label's logit and the largest other one: a row is correct if the first is larger."""
        ...

    def gradient_terms(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, "g R"]:
        """What `gradient_` needs to know of each row."""
        ...

    def gradient_(
        self,
        logits_: Float[Tensor, "R tK"],
        target: TileTarget,
        terms: Float[Tensor, "g R"],
        upstream: Float[Tensor, " R"],
    ) -> None:
        """Overwrite a tile's logits by `upstream[i] * dL_i/ds_ij`."""
        ...


class RowRule(NamedTuple):
    """The gradient of a loss of softmax form: for j other than the label

    dL_i/ds_ij = factor_i * exp(s_ij - normaliser_i) - offset_i, and `label_i` for the label. What
    `label` says counts on the owner of the label only.
    """

    normaliser: Float[Tensor, " R"]
    factor: Float[Tensor, " R"]
    offset: Float[Tensor, " R"]
    label: Float[Tensor, " R"]


@runtime_checkable
class SoftmaxForm(RowLoss, Protocol):
    """A row loss to which the other classes matter by their largest logit, the sum of their
    exponentials and the sum of their logits alone.

    Its tile work is one exponential a logit, which kernels do beside the matrix product
    (`parallel.class_sweeps`); everything else is done once a row. `softmax_form` finds out.
    """

    @property
    def has_softmax_form(self) -> bool:
        """Whether this very loss, with its parts, is of the form."""
        ...

    @property
    def needs_gap(self) -> bool:
        """Whether the sum of logits matters."""
        ...

    @property
    def logit_shift(self) -> Float[Tensor, " c"] | None:
        """What is added to the logits of this worker's classes before anything else."""
        ...

    def statistics_of_sums(
        self,
        label: Float[Tensor, " R"],
        rival: Float[Tensor, " R"],
        mass: Float[Tensor, " R"],
        gap: Float[Tensor, " R"],
        target: TileTarget,
        num_classes: int,
    ) -> Float[Tensor, "k R"]:
        """As `tile_statistics`, from the sums over a worker's classes.

        Args:
            label: the label's shifted logit, -inf where the label is elsewhere.
            rival: largest other logit.
            mass: sum of exp(s - rival) over the other classes.
            gap: sum of (rival - s) over the other classes, if needed.
            target: of all of this worker's classes.
            num_classes: classes that took part.
        """
        ...

    def row_rule(
        self, statistics: Float[Tensor, "k R"], target: TileTarget, upstream: Float[Tensor, " R"]
    ) -> RowRule:
        """As `gradient_terms` and `gradient_`, for all tiles of a worker at once."""
        ...


def softmax_form(loss: Any) -> SoftmaxForm | None:
    """The loss, if it is of softmax form."""
    return loss if getattr(loss, "has_softmax_form", False) else None


def statistics_of_no_class(
    form: SoftmaxForm, labels: Int[Tensor, " R"], dtype: torch.dtype
) -> Float[Tensor, "k R"]:
    """What a worker says of which no class takes part: the neutral element of `merge`."""
    zero = torch.zeros(len(labels), dtype=dtype, device=labels.device)
    rival = zero + torch.finfo(dtype).min / 4
    target = TileTarget.of(torch.full_like(labels, -1), 0, 1)
    return form.statistics_of_sums(zero - torch.inf, rival, zero, zero, target, 0)
