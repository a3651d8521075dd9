"""Losses of rows against proxies that are spread over workers: what each worker adds, and slopes.

`chance_constraints.against_proxies` sees all proxies of an anchor at once. Here the proxies of its
own class, which lie on one worker, are compared first and are known to all; the others come in
tiles. Of each tile a row keeps a few numbers, its parts, which merge over tiles and workers, and
from which its loss and the slopes of all its values follow. Equal to `against_proxies`.

Dimensions: n rows, K proxies of a row's own class, t proxies of other classes (a tile), P parts of
a row, w parts to merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.contrastive import Contrastive
from dist_dml.losses.multi_similarity import MultiSimilarity
from dist_dml.losses.pairs import AnchorLoss, Comparison, PairLoss
from dist_dml.losses.triplet import Triplet


class OwnProxies(NamedTuple):
    """Rows against the proxies of their own class.

    Attributes:
        values: see `pairs.Comparison`; 0 where there are none.
        there: whether the row is counted and its class has proxies.
    """

    values: Float[Tensor, "n K"]
    there: Bool[Tensor, " n"]


@runtime_checkable  # The tests execute all annotations.
class ProxyRule(Protocol):
    """One loss; `of_rows(...)` and slopes belong together, and slopes are d loss_i / d value_ij."""

    @property
    def comparison(self) -> Comparison:
        """What rows and proxies are compared by."""
        ...

    def of_others(
        self, values: Float[Tensor, "n t"], other: Bool[Tensor, "n t"], own: OwnProxies
    ) -> Float[Tensor, "P n"]:
        """The parts of a tile, in float64; `other` says which proxies are of another class."""
        ...

    def merged(self, parts: Float[Tensor, "w P n"]) -> Float[Tensor, "P n"]:
        """The parts of the union."""
        ...

    def of_rows(
        self, own: OwnProxies, counted: Bool[Tensor, " n"], parts: Float[Tensor, "P n"]
    ) -> AnchorLoss:
        """Values and weights of the rows, from the parts of all proxies."""
        ...

    def own_slopes(self, own: OwnProxies, parts: Float[Tensor, "P n"]) -> Float[Tensor, "n K"]:
        """Slopes of `own.values`; 0 where there are none."""
        ...

    def other_slopes(
        self,
        values: Float[Tensor, "n t"],
        other: Bool[Tensor, "n t"],
        own: OwnProxies,
        parts: Float[Tensor, "P n"],
    ) -> Float[Tensor, "n t"]:
        """Slopes of a tile; 0 where `other` is false."""
        ...


def proxy_rule(loss: PairLoss) -> ProxyRule:
    """The rule of a loss.

    Raises:
        UsageError: for losses, minings and miners that paper C does not put into its algorithm.
    """
    match loss:
        case Contrastive(power=1):
            return ContrastiveRule(loss)
        case MultiSimilarity(epsilon=None):
            return MultiSimilarityRule(loss)
        case Triplet(mining="all"):
            return TripletRule(loss)
        case _:
            raise UsageError(
                f"proxies: got the loss {loss}; expected C1, C2, triplet with loss.mining=all or "
                "multi-similarity without a miner (loss.mining_epsilon=null); set loss.name"
            )


@dataclass(frozen=True)
class ContrastiveRule:
    """Parts: the sum of the others' terms, and how many are above zero."""

    loss: Contrastive

    @property
    def comparison(self) -> Comparison:
        """See `ProxyRule`."""
        return self.loss.comparison

    @property
    def _sign(self) -> int:
        """Of a positive's slope: distances are to fall, similarities to grow."""
        return -1 if self.loss.comparison in ("cosine", "inner") else 1

    def of_others(
        self, values: Float[Tensor, "n t"], other: Bool[Tensor, "n t"], own: OwnProxies
    ) -> Float[Tensor, "P n"]:
        """See `ProxyRule`."""
        del own
        terms = self._far(values, other)
        return torch.stack([terms.sum(1).double(), (terms > 0).sum(1).double()])

    def merged(self, parts: Float[Tensor, "w P n"]) -> Float[Tensor, "P n"]:
        """See `ProxyRule`."""
        return parts.sum(0)

    def of_rows(
        self, own: OwnProxies, counted: Bool[Tensor, " n"], parts: Float[Tensor, "P n"]
    ) -> AnchorLoss:
        """See `ProxyRule`."""
        near = self._near(own)
        values, terms = near.sum(1).double() + parts[0], (near > 0).sum(1).double() + parts[1]
        weights = counted.double() if self.loss.reduction == "anchors" else terms
        return AnchorLoss(values, weights)

    def own_slopes(self, own: OwnProxies, parts: Float[Tensor, "P n"]) -> Float[Tensor, "n K"]:
        """See `ProxyRule`."""
        del parts
        return self._sign * (self._near(own) > 0).to(own.values.dtype)

    def other_slopes(
        self,
        values: Float[Tensor, "n t"],
        other: Bool[Tensor, "n t"],
        own: OwnProxies,
        parts: Float[Tensor, "P n"],
    ) -> Float[Tensor, "n t"]:
        """See `ProxyRule`."""
        del own, parts
        return -self._sign * (self._far(values, other) > 0).to(values.dtype)

    def _near(self, own: OwnProxies) -> Float[Tensor, "n K"]:
        terms = (self._sign * (own.values - self.loss.positive_margin)).relu()
        return terms * (own.there[:, None] & (self.loss.part != "negative"))

    def _far(
        self, values: Float[Tensor, "n t"], other: Bool[Tensor, "n t"]
    ) -> Float[Tensor, "n t"]:
        if self.loss.part == "positive":
            return torch.zeros_like(values)
        return (-self._sign * (values - self.loss.negative_margin)).relu_() * other


@dataclass(frozen=True)
class MultiSimilarityRule:
    """Part: log of the sum of exp(b (s - l)) over the others."""

    loss: MultiSimilarity

    @property
    def comparison(self) -> Comparison:
        """See `ProxyRule`."""
        return self.loss.comparison

    def of_others(
        self, values: Float[Tensor, "n t"], other: Bool[Tensor, "n t"], own: OwnProxies
    ) -> Float[Tensor, "P n"]:
        """See `ProxyRule`."""
        del own
        exponents = self.loss.beta * (values - self.loss.base)
        # Not -inf, whose difference to itself is nan.
        nothing = torch.finfo(values.dtype).min / 4
        return exponents.masked_fill_(~other, nothing).logsumexp(1).double()[None]

    def merged(self, parts: Float[Tensor, "w P n"]) -> Float[Tensor, "P n"]:
        """See `ProxyRule`."""
        return parts.logsumexp(0)

    def of_rows(
        self, own: OwnProxies, counted: Bool[Tensor, " n"], parts: Float[Tensor, "P n"]
    ) -> AnchorLoss:
        """See `ProxyRule`."""
        far = torch.where(counted, _log_one_plus(parts[0]), 0)
        values = self._near(own)[1] / self.loss.alpha + far / self.loss.beta
        return AnchorLoss(values, counted.double())

    def own_slopes(self, own: OwnProxies, parts: Float[Tensor, "P n"]) -> Float[Tensor, "n K"]:
        """See `ProxyRule`."""
        del parts
        exponents, logarithm = self._near(own)
        slopes = -(exponents - logarithm[:, None]).exp()
        return torch.where(own.there[:, None], slopes, 0).to(own.values.dtype)

    def other_slopes(
        self,
        values: Float[Tensor, "n t"],
        other: Bool[Tensor, "n t"],
        own: OwnProxies,
        parts: Float[Tensor, "P n"],
    ) -> Float[Tensor, "n t"]:
        """See `ProxyRule`."""
        del own
        logarithm = _log_one_plus(parts[0]).to(values.dtype)
        exponents = self.loss.beta * (values - self.loss.base) - logarithm[:, None]
        # A proxy of the own class may be far above all others.
        return exponents.masked_fill_(~other, -torch.inf).exp_()

    def _near(self, own: OwnProxies) -> tuple[Float[Tensor, "n K"], Float[Tensor, " n"]]:
        """Exponents of the own proxies and log(1 + the sum of exp), 0 where there are none."""
        exponents = -self.loss.alpha * (own.values.double() - self.loss.base)
        return exponents, torch.where(own.there, _log_one_plus(exponents.logsumexp(1)), 0)


def _log_one_plus(logarithm: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.logaddexp(logarithm, torch.zeros_like(logarithm))


@dataclass(frozen=True)
class TripletRule:
    """Parts: the sum of the triplets' terms, the number of others, and for each of the K own
    proxies how many triplets above zero it is in.

    A row has K positives only, so that K passes over a tile count all triplets.
    """

    loss: Triplet

    @property
    def comparison(self) -> Comparison:
        """See `ProxyRule`."""
        return self.loss.comparison

    @property
    def _sign(self) -> int:
        return -1 if self.loss.comparison in ("cosine", "inner") else 1

    def of_others(
        self, values: Float[Tensor, "n t"], other: Bool[Tensor, "n t"], own: OwnProxies
    ) -> Float[Tensor, "P n"]:
        """See `ProxyRule`."""
        total = torch.zeros_like(own.there, dtype=torch.float64)
        counts = []
        for reach in self._reaches(own).unbind(1):
            terms = (reach[:, None] - self._sign * values).relu_().mul_(other)
            total += terms.sum(1)
            counts.append((terms > 0).sum(1).double())
        return torch.stack([total, other.sum(1).double(), *counts])

    def merged(self, parts: Float[Tensor, "w P n"]) -> Float[Tensor, "P n"]:
        """See `ProxyRule`."""
        return parts.sum(0)

    def of_rows(
        self, own: OwnProxies, counted: Bool[Tensor, " n"], parts: Float[Tensor, "P n"]
    ) -> AnchorLoss:
        """See `ProxyRule`."""
        del counted  # Rows that are not have no proxies of their own.
        if self.loss.reduction == "nonzero":
            return AnchorLoss(parts[0], parts[2:].sum(0))
        return AnchorLoss(parts[0] / self._mined(own, parts), (own.there & (parts[1] > 0)).double())

    def own_slopes(self, own: OwnProxies, parts: Float[Tensor, "P n"]) -> Float[Tensor, "n K"]:
        """See `ProxyRule`."""
        divisor = 1 if self.loss.reduction == "nonzero" else self._mined(own, parts)
        return (self._sign * parts[2:] / divisor).T.to(own.values.dtype)

    def other_slopes(
        self,
        values: Float[Tensor, "n t"],
        other: Bool[Tensor, "n t"],
        own: OwnProxies,
        parts: Float[Tensor, "P n"],
    ) -> Float[Tensor, "n t"]:
        """See `ProxyRule`."""
        counts = torch.zeros_like(values)
        for reach in self._reaches(own).unbind(1):
            # As in `of_others`: a triplet must count on both sides or on none.
            counts += (reach[:, None] - self._sign * values) > 0
        counts = -self._sign * counts * other
        if self.loss.reduction == "nonzero":
            return counts
        return counts / self._mined(own, parts).to(values.dtype)[:, None]

    def _reaches(self, own: OwnProxies) -> Float[Tensor, "n K"]:
        reaches = self._sign * own.values + self.loss.margin
        return reaches.masked_fill(~own.there[:, None], -torch.inf)

    def _mined(self, own: OwnProxies, parts: Float[Tensor, "P n"]) -> Float[Tensor, " n"]:
        return (own.values.shape[1] * parts[1]).clamp_min(1)
