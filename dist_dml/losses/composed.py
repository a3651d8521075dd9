"""A row loss with what stands before it: centres of a class, a prior, a margin, class weights.

Every part changes the logits of a tile and multiplies the gradient back; none knows another.

Dimensions: R rows, t classes of a tile, c classes of this worker, K centres, k numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dist_dml.losses.margins import Margin
from dist_dml.losses.softmax import RowLoss, TileTarget


@runtime_checkable
class Pooling(Protocol):
    """One logit of a class from those of its K centres."""

    @property
    def centres(self) -> int:
        """K."""
        ...

    @property
    def buffers(self) -> float:
        """Buffers of R x t numbers beside the logits."""
        ...

    def pool_(self, logits_: Float[Tensor, "R t K"]) -> Float[Tensor, "R t"]:
        """The classes' logits; `logits_` becomes the derivative of each by its centres' logits."""
        ...


@dataclass(frozen=True)
class LargestCentre:
    """Sub-centre ArcFace (Deng et al., ECCV 2020): the best of K centres; ties share the gradient.

    Attributes:
        centres: K.
    """

    centres: int
    buffers = 2.0

    def pool_(self, logits_: Float[Tensor, "R t K"]) -> Float[Tensor, "R t"]:
        """Maximum; derivative 1 for the winner."""
        pooled = logits_.amax(2)
        logits_.sub_(pooled[:, :, None]).eq_(0)
        logits_.div_(logits_.sum(2, keepdim=True))
        return pooled


@dataclass(frozen=True)
class SoftCentre:
    """SoftTriple (Qian et al., ICCV 2019, eq. 8): centres averaged by a softmax of their logits.

    S = sum_k pi_k s_k with pi = softmax(sharpness * s); dS/ds_k = pi_k (1 + sharpness (s_k - S)).

    Attributes:
        centres: K.
        sharpness: 1 / (gamma * scale), as the logits are `scale` times the cosines.
    """

    centres: int
    sharpness: float

    @property
    def buffers(self) -> float:
        """The softmax has the size of the logits, its maximum and sum that of the classes."""
        return self.centres + 2.0

    def pool_(self, logits_: Float[Tensor, "R t K"]) -> Float[Tensor, "R t"]:
        """Soft maximum."""
        shares = logits_ * self.sharpness
        shares.sub_(shares.amax(2, keepdim=True)).exp_()
        shares.div_(shares.sum(2, keepdim=True))
        pooled = logits_.mul_(shares).sum(2)
        rest = pooled.mul(-self.sharpness).add_(1)
        logits_.mul_(self.sharpness).addcmul_(shares, rest[:, :, None])
        return pooled


@dataclass(frozen=True)
class ComposedLoss:
    """`base` over logits that are pooled over centres, shifted by a prior, and given a margin.

    Equal to `w_y * base(pool(logits) + log_prior, with the label's logit replaced by
    scale * margin(cosine))`. Whether a row is correct is judged without the margin.

    Attributes:
        base: what is computed of the classes' logits.
        scale: logit of a cosine of 1, which margins need.
        pooling: of K centres a class; None for one.
        margin: of the label's cosine.
        log_prior: (c,) added to the logits: balanced softmax (Ren et al., NeurIPS 2020).
        class_weight: (c,) factor of the rows of a class.
    """

    base: RowLoss
    scale: float = 1.0
    pooling: Pooling | None = None
    margin: Margin | None = None
    log_prior: Float[Tensor, " c"] | None = None
    class_weight: Float[Tensor, " c"] | None = None

    @property
    def centres(self) -> int:
        """K."""
        return 1 if self.pooling is None else self.pooling.centres

    @property
    def buffers(self) -> float:
        """Those of the parts."""
        return self.base.buffers + (0.0 if self.pooling is None else self.pooling.buffers)

    @property
    def row_numbers(self) -> int:
        """Two more: the label's logit without margin, and its weight."""
        return self.base.row_numbers + 2

    @property
    def refined(self) -> bool:
        """As the base."""
        return self.base.refined

    def _classes_(
        self, logits_: Float[Tensor, "R tK"], target: TileTarget
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The base's logits, the label's without margin, the margin's derivative.

        With a pooling, `logits_` becomes its derivative.
        """
        logits = logits_
        if self.pooling is not None:
            logits = self.pooling.pool_(logits_.unflatten(1, (-1, self.pooling.centres)))
        if self.log_prior is not None:
            logits.add_(self.log_prior[target.local])
        label = target.read(logits)
        if self.margin is None:
            return logits, label, torch.ones_like(label)
        cosine, derivative = self.margin.apply(target.read(logits, 0.0) / self.scale, target)
        target.write_(logits, cosine * self.scale)
        return logits, label, derivative

    def tile_statistics(
        self, logits_: Float[Tensor, "R tK"], target: TileTarget
    ) -> Float[Tensor, "k R"]:
        """The label's logit without margin, the row's weight, then the base's."""
        logits, label, _ = self._classes_(logits_, target)
        weight = torch.zeros_like(label)
        if self.class_weight is not None:
            weights = self.class_weight[target.local][target.column]
            weight = torch.where(target.present, weights, weight)
        own = torch.stack((label, weight))
        return torch.cat((own, self.base.tile_statistics(logits, target)))

    def merge(self, parts: Float[Tensor, "n k R"]) -> Float[Tensor, "k R"]:
        """Maximum; sum (all owners but one say 0); the base's rule."""
        label, weight = parts[:, :1].amax(0), parts[:, 1:2].sum(0)
        return torch.cat((label, weight, self.base.merge(parts[:, 2:])))

    def tile_refinement(
        self, logits_: Float[Tensor, "R tK"], target: TileTarget, statistics: Float[Tensor, "k R"]
    ) -> Float[Tensor, "m R"]:
        """The base's."""
        logits, _, _ = self._classes_(logits_, target)
        return self.base.tile_refinement(logits, target, statistics[2:])

    def values(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, " R"]:
        """The base's, weighted."""
        values = self.base.values(statistics[2:])
        return values if self.class_weight is None else values * statistics[1]

    def label_and_rival(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, "2 R"]:
        """Label without margin; largest other logit."""
        rival = self.base.label_and_rival(statistics[2:])[1]
        return torch.stack((statistics[0], rival))

    def gradient_terms(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, "g R"]:
        """The row's weight, then the base's."""
        terms = self.base.gradient_terms(statistics[2:])
        weight = statistics[1:2] if self.class_weight is not None else torch.ones_like(terms[:1])
        return torch.cat((weight, terms))

    def gradient_(
        self,
        logits_: Float[Tensor, "R tK"],
        target: TileTarget,
        terms: Float[Tensor, "g R"],
        upstream: Float[Tensor, " R"],
    ) -> None:
        """The base's, through margin and pooling."""
        logits, _, derivative = self._classes_(logits_, target)
        self.base.gradient_(logits, target, terms[1:], upstream * terms[0])
        if self.margin is not None:
            target.write_(logits, target.read(logits) * derivative)
        if self.pooling is not None:
            logits_.unflatten(1, (-1, self.pooling.centres)).mul_(logits[:, :, None])
