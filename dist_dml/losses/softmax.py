"""What a softmax-like loss needs of its logits: row statistics, a value, a gradient rule.

A loss of this family never sees all classes of a row at once. It sees tiles of them, in any order
and on any worker, and says (DESIGN of the class-parallel objective, `docs/ARCHITECTURE.md`):

1. `tile_statistics`: a few numbers a row from one tile of logits,
2. `merge`: how the numbers of two disjoint sets of classes become those of their union; associative
   and commutative up to rounding, so that tiles and workers merge by the same rule,
3. `values`: the loss of each row from the merged numbers,
4. `gradient_`: dL/ds of a tile from the tile's logits and the merged numbers.

Dimensions: R rows, C classes of all workers, t classes of a tile, k statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TileTarget:
    """Where each row's label lies in a tile, if it does.

    `column` (R,) is the label's column, 0 where the label is elsewhere; `present` (R,) tells which.
    Both keep the shape fixed, so that nothing waits for the device to count rows.
    """

    column: Int[Tensor, " R"]
    present: Bool[Tensor, " R"]

    @staticmethod
    def of(labels: Int[Tensor, " R"], start: int, stop: int) -> TileTarget:
        """The targets in the tile of class ids `start..stop-1`."""
        present = (labels >= start) & (labels < stop)
        return TileTarget(torch.where(present, labels - start, 0), present)


@runtime_checkable  # The tests execute all annotations.
class RowLoss(Protocol):
    """A loss whose rows are independent of each other; see the module's text for the four parts."""

    def tile_statistics(
        self, logits_: Float[Tensor, "R t"], target: TileTarget
    ) -> Float[Tensor, "k R"]:
        """The statistics of one tile. Overwrites `logits_`, which saves a buffer of its size."""
        ...

    def merge(
        self, first: Float[Tensor, "k R"], second: Float[Tensor, "k R"]
    ) -> Float[Tensor, "k R"]:
        """The statistics of the union of two disjoint sets of classes."""
        ...

    def values(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, " R"]:
        """The loss of each row."""
        ...

    def correct(self, statistics: Float[Tensor, "k R"]) -> Bool[Tensor, " R"]:
        """Whether the label's logit is above every other one (a tie is not)."""
        ...

    def gradient_(
        self,
        logits_: Float[Tensor, "R t"],
        target: TileTarget,
        statistics: Float[Tensor, "k R"],
        upstream: Float[Tensor, " R"],
    ) -> None:
        """Overwrite a tile's logits by `upstream[i] * dL_i/ds_ij`."""
        ...


# Rows of the cross-entropy's statistics. `_PEAK` is the largest logit, `_MASS` the sum of
# exp(s - peak), `_TARGET` the label's logit (-inf where the label is elsewhere), `_RIVAL` the
# largest other logit. For label smoothing, `_GAP` is the sum of (peak - s) and `_COUNT` the number
# of classes: a plain sum of logits would cancel against (C - 1) * peak and lose all digits at many
# classes.
_PEAK, _MASS, _TARGET, _RIVAL, _GAP, _COUNT = range(6)


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy, with paper B's label smoothing.

    Equal to `F.cross_entropy(logits, labels, reduction="none", label_smoothing=e * C / (C - 1))`:
    the true class gets 1 - e and every *other* class e / (C - 1), whereas PyTorch spreads e over
    all C classes (paper B's code, papers.md 3.12). That code reports the KL divergence, which is
    smaller by the entropy of the smoothed label, a constant; the gradients are the same.

    Attributes:
        num_classes: C, of all workers.
        label_smoothing: e in [0, 1).
    """

    num_classes: int
    label_smoothing: float = 0.0

    def tile_statistics(
        self, logits_: Float[Tensor, "R t"], target: TileTarget
    ) -> Float[Tensor, "k R"]:
        """Six numbers a row; see `RowLoss`. Three passes over the tile, one exponential a logit."""
        column = target.column[:, None]
        at_column = logits_.gather(1, column).squeeze(1)
        target_logit = torch.where(target.present, at_column, float("-inf"))
        # The rival is the maximum with the label's own logit hidden; hiding and putting back
        # touches R elements only.
        hidden = torch.where(target.present, float("-inf"), at_column)
        logits_.scatter_(1, column, hidden[:, None])
        rival = logits_.amax(1)
        logits_.scatter_(1, column, at_column[:, None])
        peak = torch.maximum(rival, target_logit)
        logits_.sub_(peak[:, None])
        # The gap serves smoothing alone and costs a pass over the tile, so it is skipped otherwise.
        gap = -logits_.sum(1) if self.label_smoothing > 0 else torch.zeros_like(peak)
        mass = logits_.exp_().sum(1)
        count = torch.full_like(peak, logits_.shape[1])
        return torch.stack((peak, mass, target_logit, rival, gap, count))

    def merge(
        self, first: Float[Tensor, "k R"], second: Float[Tensor, "k R"]
    ) -> Float[Tensor, "k R"]:
        """Maxima of maxima; masses rescaled and gaps shifted to the common peak."""
        peak = torch.maximum(first[_PEAK], second[_PEAK])
        first_drop, second_drop = peak - first[_PEAK], peak - second[_PEAK]
        mass = first[_MASS] * torch.exp(-first_drop) + second[_MASS] * torch.exp(-second_drop)
        gap = first[_GAP] + first[_COUNT] * first_drop
        gap = gap + second[_GAP] + second[_COUNT] * second_drop
        return torch.stack(
            (
                peak,
                mass,
                torch.maximum(first[_TARGET], second[_TARGET]),
                torch.maximum(first[_RIVAL], second[_RIVAL]),
                gap,
                first[_COUNT] + second[_COUNT],
            )
        )

    def values(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, " R"]:
        """lse - sum_j t_j s_j, from differences to the peak, which stay exact at logits of 1e4."""
        log_mass = statistics[_MASS].log()
        to_target = statistics[_PEAK] - statistics[_TARGET]
        if self.label_smoothing == 0:
            return log_mass + to_target
        others = statistics[_GAP] - to_target
        share = self.label_smoothing / (self.num_classes - 1)
        return log_mass + (1 - self.label_smoothing) * to_target + share * others

    def correct(self, statistics: Float[Tensor, "k R"]) -> Bool[Tensor, " R"]:
        """Label above all rivals. Ties count as wrong: zero weights must not score 100%."""
        return statistics[_TARGET] > statistics[_RIVAL]

    def gradient_(
        self,
        logits_: Float[Tensor, "R t"],
        target: TileTarget,
        statistics: Float[Tensor, "k R"],
        upstream: Float[Tensor, " R"],
    ) -> None:
        """(softmax - smoothed label) times upstream; softmax from log-probabilities, in place."""
        log_normaliser = statistics[_PEAK] + statistics[_MASS].log()
        logits_.sub_(log_normaliser[:, None]).exp_()
        off_target = self.label_smoothing / (self.num_classes - 1) if self.label_smoothing else 0.0
        if off_target:
            logits_.sub_(off_target)
        extra = target.present.to(logits_.dtype) * -(1 - self.label_smoothing - off_target)
        logits_.scatter_add_(1, target.column[:, None], extra[:, None])
        logits_.mul_(upstream[:, None])
