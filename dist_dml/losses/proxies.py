"""Proxy losses that are not row losses: Proxy-Anchor, and SoftTriple's term on its centres.

Proxy-Anchor couples rows: its statistics are per *class*, over all gathered rows, hence local to
the class's owner. It is the mirror image of `losses.softmax.RowLoss`. (ProxyNCA++ and SoftTriple's
main term are row losses: see `parallel.objectives`.)

Dimensions: R rows, C classes of all workers, t classes of a tile, K centres of a class, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dist_dml.losses.softmax import TileTarget


@runtime_checkable
class ColumnLoss(Protocol):
    """A loss of classes, each over all rows of the batch."""

    @property
    def buffers(self) -> float:
        """Buffers of R x t numbers that it uses beside the logits."""
        ...

    def tile_sums(self, logits_: Float[Tensor, "R t"], target: TileTarget) -> Float[Tensor, " m"]:
        """Numbers that are summed over tiles and workers. Overwrites `logits_`."""
        ...

    def value(self, sums: Float[Tensor, " m"]) -> Float[Tensor, ""]:
        """The loss of the batch."""
        ...

    def gradient_(
        self,
        logits_: Float[Tensor, "R t"],
        target: TileTarget,
        sums: Float[Tensor, " m"],
        upstream: Float[Tensor, ""],
    ) -> None:
        """Overwrite a tile's logits by `upstream * dL/ds_ij`."""
        ...


@dataclass(frozen=True)
class ProxyAnchor:
    """Proxy-Anchor (Kim et al., CVPR 2020, eq. 4), with s_ij = scale * cos(row i, proxy j):

        1/|P+| sum_{j in P+} log(1 + sum_{i: y_i = j} e^-(s_ij - shift))
        + 1/C sum_j log(1 + sum_{i: y_i != j} e^(s_ij + shift)),       shift = scale * margin

    P+ are the classes with rows in the batch. Costs no more than a row loss: every sum runs down
    a column, and three numbers are agreed on.

    Attributes:
        num_classes: C, of all workers.
        shift: scale (alpha, 32) times margin (delta, 0.1).
    """

    num_classes: int
    shift: float
    buffers = 0.0

    def tile_sums(self, logits_: Float[Tensor, "R t"], target: TileTarget) -> Float[Tensor, "3"]:
        """Sums of the two logarithms, and how many classes have rows."""
        attraction, present = self._attraction(logits_, target)
        peak, mass = self._repel_(logits_, target)
        repulsion = peak + mass.log()
        return torch.stack((attraction.sum(), repulsion.sum(), present.sum()))

    def _attraction(self, logits: Tensor, target: TileTarget) -> tuple[Tensor, Tensor]:
        """log(1 + sum over a class's own rows), and 1 for classes that have any: (t,) each."""
        exponent = self.shift - target.read(logits, float("inf"))
        peak = logits.new_zeros(logits.shape[1])
        peak = peak.scatter_reduce(0, target.column, exponent, "amax")
        mass = (-peak).exp()
        mass = mass.index_add(0, target.column, (exponent - peak[target.column]).exp())
        present = torch.zeros_like(peak).index_add(
            0, target.column, target.present.to(logits.dtype)
        )
        return peak + mass.log(), (present > 0).to(logits.dtype)

    def _repel_(self, logits_: Tensor, target: TileTarget) -> tuple[Tensor, Tensor]:
        """Peak and mass of 1 + the sum over other classes' rows; `logits_` become its terms."""
        target.write_(logits_, float("-inf"))
        if target.absent is not None:
            logits_.masked_fill_(target.absent[:, None], float("-inf"))
        peak = (logits_.amax(0) + self.shift).clamp_min(0)
        logits_.sub_((peak - self.shift)[None]).exp_()
        return peak, logits_.sum(0) + (-peak).exp()

    def value(self, sums: Float[Tensor, "3"]) -> Float[Tensor, ""]:
        """Each kind over its own number of classes."""
        return sums[0] / sums[2].clamp_min(1) + sums[1] / self.num_classes

    def gradient_(
        self,
        logits_: Float[Tensor, "R t"],
        target: TileTarget,
        sums: Float[Tensor, "3"],
        upstream: Float[Tensor, ""],
    ) -> None:
        """Each row's share of its column's logarithm."""
        attraction, _ = self._attraction(logits_, target)
        exponent = self.shift - target.read(logits_, float("inf"))
        pull = -(exponent - attraction[target.column]).exp() / sums[2].clamp_min(1)
        _, mass = self._repel_(logits_, target)
        logits_.mul_((upstream / self.num_classes / mass)[None])
        target.write_(logits_, pull * upstream)


@dataclass(frozen=True)
class CentreSpread:
    """SoftTriple's term (eq. 11): centres of a class are drawn together, so that spare ones merge.

        tau / (C K (K - 1)) * sum over classes and pairs s < t of sqrt(2 + 1e-5 - 2 w_s . w_t)

    with centres w of unit length; 1e-5 as in the authors' code, where the root has a derivative.

    Attributes:
        num_classes: C, of all workers.
        weight: tau.
    """

    num_classes: int
    weight: float

    def _factor(self, centres: int) -> float:
        return self.weight / (self.num_classes * centres * (centres - 1))

    def value(self, centres: Float[Tensor, "t K D"]) -> Float[Tensor, ""]:
        """The part of these classes."""
        distances = self._distances(F.normalize(centres, dim=2))
        return distances.triu(1).sum() * self._factor(centres.shape[1])

    def _distances(self, unit: Tensor) -> Tensor:
        return (2 + 1e-5 - 2 * unit @ unit.mT).clamp_min(1e-12).sqrt()

    def gradient(self, centres: Float[Tensor, "t K D"]) -> Float[Tensor, "t K D"]:
        """Derivative of `value`."""
        norms = torch.linalg.vector_norm(centres, dim=2, keepdim=True).clamp_min(1e-12)
        unit = centres / norms
        pull = 1 / self._distances(unit)
        pull.diagonal(dim1=1, dim2=2).zero_()
        direction = -pull @ unit
        along = torch.linalg.vecdot(direction, unit)[:, :, None]
        return (direction - along * unit) / norms * self._factor(centres.shape[1])
