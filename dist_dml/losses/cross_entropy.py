"""Softmax cross-entropy from row statistics of tiles of logits.

Dimensions: R rows, C classes of all workers, t classes of a tile, k numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dist_dml.losses.softmax import RowRule, TileTarget

# Rows of the cross-entropy's statistics. `_TARGET` is the label's logit (-inf where the label is
# elsewhere), `_RIVAL` the largest other logit, `_MASS` the sum of exp(s - rival) over the other
# classes: with the label's own share in it, 1 - p_y would lose its digits where p_y is near 1. For
# label smoothing only, `_GAP` is the others' sum of (rival - s) and `_COUNT` their number: a plain
# sum of logits would cancel against (C - 1) * rival and lose all digits at many classes.
_TARGET, _RIVAL, _MASS, _GAP, _COUNT = range(5)


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross-entropy, with label smoothing in paper B's or PyTorch's form.

    With `smoothing="all"` equal to `F.cross_entropy(logits, labels, reduction="none",
    label_smoothing=e)`, which spreads e over all C classes. With `others` the true class gets 1 - e
    and every *other* class e / (C - 1) (paper B's code): the same with e * C / (C - 1). That code
    reports the KL divergence, which is smaller by the entropy of the smoothed label, a constant;
    the gradients are the same.

    Attributes:
        num_classes: C, of all workers.
        label_smoothing: e in [0, 1).
        smoothing: who shares e.
    """

    num_classes: int
    label_smoothing: float = 0.0
    smoothing: Literal["others", "all"] = "others"

    centres = 1
    buffers = 0.0
    refined = False
    has_softmax_form = True
    logit_shift = None

    @property
    def needs_gap(self) -> bool:
        """For smoothing."""
        return self.label_smoothing > 0

    @property
    def row_numbers(self) -> int:
        """Three, and two more for smoothing."""
        return 5 if self.needs_gap else 3

    @property
    def _shares(self) -> tuple[float, float]:
        """The smoothed label: of the true class, and of each other one."""
        e, c = self.label_smoothing, self.num_classes
        if e == 0:
            return 1.0, 0.0
        return (1 - e, e / (c - 1)) if self.smoothing == "others" else (1 - e + e / c, e / c)

    def tile_statistics(
        self, logits_: Float[Tensor, "R t"], target: TileTarget
    ) -> Float[Tensor, "k R"]:
        """See `RowLoss`. Three passes over the tile, one exponential a logit."""
        label = target.read(logits_)
        target.write_(logits_, float("-inf"))
        # In a tile of nothing but the label a number, which keeps the merges' differences finite.
        rival = logits_.amax(1).clamp_min(torch.finfo(label.dtype).min / 4)
        logits_.sub_(rival[:, None])
        gap = torch.zeros_like(rival)
        if self.needs_gap:  # One more pass, for smoothing alone.
            target.write_(logits_, 0.0)
            gap = -logits_.sum(1)
            target.write_(logits_, float("-inf"))
        mass = logits_.exp_().sum(1)
        return self.statistics_of_sums(label, rival, mass, gap, target, logits_.shape[1])

    def statistics_of_sums(
        self,
        label: Float[Tensor, " R"],
        rival: Float[Tensor, " R"],
        mass: Float[Tensor, " R"],
        gap: Float[Tensor, " R"],
        target: TileTarget,
        num_classes: int,
    ) -> Float[Tensor, "k R"]:
        """See `SoftmaxForm`."""
        if not self.needs_gap:
            return torch.stack((label, rival, mass))
        count = num_classes - target.present.to(rival.dtype)
        return torch.stack((label, rival, mass, gap, count))

    def merge(self, parts: Float[Tensor, "n k R"]) -> Float[Tensor, "k R"]:
        """Maxima of maxima; masses rescaled and gaps shifted to the common rival."""
        largest = parts[:, : _RIVAL + 1].amax(0)
        drop = largest[_RIVAL] - parts[:, _RIVAL]
        mass = (parts[:, _MASS] * torch.exp(-drop)).sum(0)
        if not self.needs_gap:
            return torch.stack((*largest, mass))
        gap = (parts[:, _GAP] + parts[:, _COUNT] * drop).sum(0)
        return torch.stack((*largest, mass, gap, parts[:, _COUNT].sum(0)))

    def values(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, " R"]:
        """sum_j t_j (lse - s_j), from differences of logits, which stay exact at 1e4."""
        log_mass = statistics[_MASS].log()
        ahead = statistics[_TARGET] - statistics[_RIVAL]
        of_label, of_other = self._shares
        value = of_label * torch.logaddexp(log_mass - ahead, torch.zeros_like(ahead))
        if of_other:
            to_rival = statistics[_COUNT] * torch.logaddexp(log_mass, ahead)
            value = value + of_other * (to_rival + statistics[_GAP])
        return value

    def label_and_rival(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, "2 R"]:
        """Two of the statistics."""
        return statistics[: _RIVAL + 1]

    def tile_refinement(
        self, logits_: Float[Tensor, "R t"], target: TileTarget, statistics: Float[Tensor, "k R"]
    ) -> Float[Tensor, "m R"]:
        """Nothing."""
        return statistics[:0]

    def gradient_terms(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, "3 R"]:
        """The normaliser's logarithm, what its rounding takes from the softmax, the label's own.

        At logits of 1e4 it takes 5e-4 in float32; the factor costs nothing in the tiles.
        """
        target, rival = statistics[_TARGET], statistics[_RIVAL]
        peak, log_mass = torch.maximum(target, rival), statistics[_MASS].log()
        from_peak = torch.logaddexp(rival - peak + log_mass, target - peak)
        normaliser = peak + from_peak
        lost = (normaliser - peak) - from_peak
        of_label, _ = self._shares
        label_gradient = (1 - of_label) - torch.sigmoid(rival - target + log_mass)
        return torch.stack((normaliser, lost.exp(), label_gradient))

    def row_rule(
        self, statistics: Float[Tensor, "k R"], target: TileTarget, upstream: Float[Tensor, " R"]
    ) -> RowRule:
        """(softmax - smoothed label) times upstream."""
        normaliser, factor, label_gradient = self.gradient_terms(statistics)
        _, of_other = self._shares
        return RowRule(
            normaliser, factor * upstream, of_other * upstream, label_gradient * upstream
        )

    def gradient_(
        self,
        logits_: Float[Tensor, "R t"],
        target: TileTarget,
        terms: Float[Tensor, "3 R"],
        upstream: Float[Tensor, " R"],
    ) -> None:
        """(softmax - smoothed label) times upstream; softmax from log-probabilities, in place."""
        normaliser, factor, label_gradient = terms
        logits_.sub_(normaliser[:, None]).exp_()
        _, of_other = self._shares
        if of_other:
            logits_.sub_((of_other / factor)[:, None])
        logits_.mul_((upstream * factor)[:, None])
        target.write_(logits_, label_gradient * upstream)
