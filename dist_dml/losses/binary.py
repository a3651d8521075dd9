"""Binary cross-entropy over all classes: each class is a question of its own.

Dimensions: R rows, C classes of all workers, t classes of a tile, k numbers of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dist_dml.losses.softmax import TileTarget

_OTHERS, _LABEL, _RIVAL = range(3)


def prior_bias(num_classes: int) -> float:
    """-log C: with it every class starts near its share 1 / C instead of 1/2.

    The starting loss is then about 1 + log C instead of C log 2.
    """
    return -math.log(num_classes)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Sum over all classes of the binary cross-entropy between sigmoid(s_j) and [j = label].

    Equal to `F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(1)`.
    """

    centres = 1
    buffers = 0.0
    row_numbers = 3
    refined = False

    def tile_statistics(
        self, logits_: Float[Tensor, "R t"], target: TileTarget
    ) -> Float[Tensor, "3 R"]:
        """Sum of log(1 + e^s) over other classes, label's logit, largest other logit."""
        label = target.read(logits_)
        # Hidden, the label adds log(1 + e^-inf) = 0; log(1 + e^s) - s would cancel for large s.
        target.write_(logits_, float("-inf"))
        rival = logits_.amax(1)
        zero = torch.zeros_like(logits_[:1, :1])
        others = torch.logaddexp(logits_, zero, out=logits_).sum(1)
        return torch.stack((others, label, rival))

    def merge(self, parts: Float[Tensor, "n 3 R"]) -> Float[Tensor, "3 R"]:
        """Sum and maxima."""
        return torch.cat((parts[:, :_LABEL].sum(0), parts[:, _LABEL:].amax(0)))

    def tile_refinement(
        self, logits_: Float[Tensor, "R t"], target: TileTarget, statistics: Float[Tensor, "3 R"]
    ) -> Float[Tensor, "m R"]:
        """Nothing."""
        return statistics[:0]

    def values(self, statistics: Float[Tensor, "3 R"]) -> Float[Tensor, " R"]:
        """log(1 + e^-s_y) + sum over others of log(1 + e^s_j)."""
        return statistics[_OTHERS] - F.logsigmoid(statistics[_LABEL])

    def label_and_rival(self, statistics: Float[Tensor, "3 R"]) -> Float[Tensor, "2 R"]:
        """Two of the statistics."""
        return statistics[_LABEL:]

    def gradient_terms(self, statistics: Float[Tensor, "3 R"]) -> Float[Tensor, "1 R"]:
        """The label's own derivative: -sigmoid(-s_y), which sigmoid(s_y) - 1 would lose."""
        return -torch.sigmoid(-statistics[_LABEL])[None]

    def gradient_(
        self,
        logits_: Float[Tensor, "R t"],
        target: TileTarget,
        terms: Float[Tensor, "1 R"],
        upstream: Float[Tensor, " R"],
    ) -> None:
        """sigmoid(s_j) - [j = y]."""
        logits_.sigmoid_()
        target.write_(logits_, terms[0])
        logits_.mul_(upstream[:, None])
