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

from dist_dml.losses.margins import AngularMargin, Margin
from dist_dml.losses.softmax import RowLoss, RowRule, SoftmaxForm, TileTarget, softmax_form


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
    def _own_numbers(self) -> int:
        """The label's logit without margin if there is one, and its weight if there are any."""
        return (self.margin is not None) + (self.class_weight is not None)

    @property
    def row_numbers(self) -> int:
        """Its own and the base's."""
        return self.base.row_numbers + self._own_numbers

    @property
    def keeps_rows_together(self) -> bool:
        """Whether it is made for these very rows: a sweep must not cut them into chunks."""
        return isinstance(self.margin, AngularMargin) and self.margin.is_of_rows

    @property
    def has_softmax_form(self) -> bool:
        """Margins change the label's logit alone, priors shift, weights multiply rows."""
        return self.pooling is None and softmax_form(self.base) is not None

    @property
    def needs_gap(self) -> bool:
        """As the base."""
        return self._form.needs_gap

    @property
    def logit_shift(self) -> Float[Tensor, " c"] | None:
        """The prior."""
        return self.log_prior

    @property
    def _form(self) -> SoftmaxForm:
        form = softmax_form(self.base)
        assert form is not None
        return form

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
        return self._joined(label, target, self.base.tile_statistics(logits, target))

    def _joined(self, label: Tensor, target: TileTarget, of_base: Tensor) -> Tensor:
        own = [] if self.margin is None else [label]
        if self.class_weight is not None:
            weights = self.class_weight[target.local][target.column]
            own.append(torch.where(target.present, weights, 0.0))
        return torch.cat((torch.stack(own), of_base)) if own else of_base

    def statistics_of_sums(
        self,
        label: Float[Tensor, " R"],
        rival: Float[Tensor, " R"],
        mass: Float[Tensor, " R"],
        gap: Float[Tensor, " R"],
        target: TileTarget,
        num_classes: int,
    ) -> Float[Tensor, "k R"]:
        """See `SoftmaxForm`: the others' sums know no margin."""
        moved, _ = self._with_margin(label, target)
        of_base = self._form.statistics_of_sums(moved, rival, mass, gap, target, num_classes)
        return self._joined(label, target, of_base)

    def _with_margin(self, label: Tensor, target: TileTarget) -> tuple[Tensor, Tensor]:
        """The label's logit with its margin, -inf elsewhere, and the margin's derivative."""
        if self.margin is None:
            return label, torch.ones_like(label)
        bare = torch.where(target.present, label, 0.0) / self.scale
        cosine, derivative = self.margin.apply(bare, target)
        return torch.where(target.present, cosine * self.scale, label), derivative

    def merge(self, parts: Float[Tensor, "n k R"]) -> Float[Tensor, "k R"]:
        """Maximum; sum (all owners but one say 0); the base's rule."""
        merged = [] if self.margin is None else [parts[:, :1].amax(0)]
        own = self._own_numbers
        if self.class_weight is not None:
            merged.append(parts[:, own - 1 : own].sum(0))
        return torch.cat((*merged, self.base.merge(parts[:, own:])))

    def tile_refinement(
        self, logits_: Float[Tensor, "R tK"], target: TileTarget, statistics: Float[Tensor, "k R"]
    ) -> Float[Tensor, "m R"]:
        """The base's."""
        logits, _, _ = self._classes_(logits_, target)
        return self.base.tile_refinement(logits, target, statistics[self._own_numbers :])

    def values(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, " R"]:
        """The base's, weighted."""
        values = self.base.values(statistics[self._own_numbers :])
        return values if self.class_weight is None else values * self._weight(statistics)

    def _weight(self, statistics: Tensor) -> Tensor:
        """Of each row."""
        if self.class_weight is None:
            return torch.ones_like(statistics[0])
        return statistics[self._own_numbers - 1]

    def label_and_rival(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, "2 R"]:
        """Label without margin; largest other logit."""
        label, rival = self.base.label_and_rival(statistics[self._own_numbers :])
        return torch.stack((label if self.margin is None else statistics[0], rival))

    def gradient_terms(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, "g R"]:
        """The row's weight, then the base's."""
        terms = self.base.gradient_terms(statistics[self._own_numbers :])
        return torch.cat((self._weight(statistics)[None], terms))

    def row_rule(
        self, statistics: Float[Tensor, "k R"], target: TileTarget, upstream: Float[Tensor, " R"]
    ) -> RowRule:
        """The base's, weighted, with the margin's derivative at the label."""
        of_base = statistics[self._own_numbers :]
        rule = self._form.row_rule(of_base, target, upstream * self._weight(statistics))
        if self.margin is None:
            return rule
        _, derivative = self._with_margin(statistics[0], target)
        return rule._replace(label=rule.label * derivative)

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
