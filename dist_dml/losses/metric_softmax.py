"""Paper A's L1 and L2 as row losses: `-(1/p) [log(1 - k om^p) + sum_{j != y} log(1 - k q_j^p)]`.

q is the softmax of the logits s, om = sum_{j != y} q_j. Two probabilities of a row may be close to
1 and are treated apart, in the logarithm: om when the row is wrong, and the probability of the top
rival t, the largest logit besides the label's. All others are at most 1/2. With

    G(P) = (1 - P) k P^p / (1 - k P^p),   H = sum_{j != y,t} h_j,   h_j = k q_j^p / (1 - k q_j^p)

the gradient of reference 2.5 becomes a sum in which nothing overflows and nothing cancels, also
where 1 - q_t is 1e-4000 (lse_-j is the log-sum-exp of all logits but s_j):

    dL/ds_j = h_j + e^(s_j - lse_-y) G(om) - q_j H - e^(s_j - lse_-t) G(q_t)        j != y, t
    dL/ds_t = G(q_t) + e^(s_t - lse_-y) G(om) - q_t H
    dL/ds_y = -G(om) - q_y H - e^(s_y - lse_-t) G(q_t)

H and the sum of logarithms need the log-sum-exp over all classes before they can be added up. They
come either from a second sweep, or from the power series of both in q^p,

    log(1 - x) = -sum_n x^n / n,   x / (1 - x) = sum_n x^n,   x = k q^p,

whose power sums sum_j e^(n p s_j) the first sweep accumulates, if the few largest logits are kept
aside and treated exactly (reference 6.2). With M kept, every other q is at most 1 / (M + 1), so the
first omitted term is at most (M + 1)^(-p N) / (N + 1) of the whole: 1.7e-7 for p = 1, M = 32, N = 4
on *any* logits, 6e-7 for p = 0.9, 1.8e-4 for p = 0.5. Hence the rule of `power_sums_suffice`.

Dimensions: R rows, t classes of a tile, M kept rivals, N powers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dist_dml.losses.largest import largest_entries
from dist_dml.losses.log_space import exp_from, first_power_sums, label_term, slope
from dist_dml.losses.row_view import RowView, id_numbers, id_of, place_of
from dist_dml.losses.softmax import TileTarget
from dist_dml.metric_parameters import MetricParameters

_KEPT, _POWERS = 32, 4
_SMALLEST_P_OF_EXP = 0.25
# Pieces of a tile that are worked on one after the other: what a piece needs besides stays in the
# caches and counts little against the tile.
_PIECES = 8


def power_sums_suffice(p: float) -> bool:
    """Whether the power sums reach float32: the first omitted term is below 1.1e-6 of the whole."""
    return (_KEPT + 1) ** (-p * _POWERS) / (_POWERS + 1) < 1.5e-6


@dataclass(frozen=True)
class MetricSoftmax:
    """L1 (k = p = 1) and L2 of paper A, (15) and (16), of softmax vectors.

    Equal to `losses.metric_space.MetricLoss(parameters).to_label(logits.log_softmax(1), labels)`.
    L1 is cross-entropy plus `-sum_{j != y} log(1 - q_j)`. Finite for all finite logits.

    Attributes:
        parameters: k and p.
        powers: find the sums from power sums of one sweep (float32 accuracy) instead of a second
            sweep (exact).
    """

    parameters: MetricParameters
    powers: bool = False

    centres = 1
    buffers = 1 / _PIECES

    @property
    def row_numbers(self) -> int:
        """Label, kept rivals, top rival's id in two parts, mass, power sums, and what is refined.

        A merge sorts two lists of kept rivals and gets their places as well.
        """
        return 6 + 5 * self._kept // 2 + self._powers

    @property
    def refined(self) -> bool:
        """Unless the power sums do."""
        return not self.powers

    @property
    def _kept(self) -> int:
        return _KEPT if self.powers else 2

    @property
    def _powers(self) -> int:
        return _POWERS if self.powers else 0

    @property
    def _log_k(self) -> float:
        return math.log(self.parameters.k)

    def tile_statistics(
        self, logits_: Float[Tensor, "R t"], target: TileTarget
    ) -> Float[Tensor, "k R"]:
        """Label's logit; largest rivals; top rival's id; sums over the rest, from the last kept."""
        label = target.read(logits_)
        target.write_(logits_, float("-inf"))
        rivals, columns = largest_entries(logits_, self._kept)
        top_id = columns[:, 0] + target.first_id
        logits_.scatter_(1, columns, float("-inf"))
        # With fewer rivals than are kept there is no rest, and any finite reference will do.
        reference = rivals[:, -1].masked_fill(rivals[:, -1] == float("-inf"), 0.0)
        logits_.sub_(reference[:, None])
        mass, *sums = torch.stack([self._sums_(part) for part in _pieces(logits_)]).sum(0)
        ids = id_numbers(top_id, label.dtype)
        return torch.stack((label, *rivals.unbind(1), *ids, mass, *sums))

    def _sums_(self, logits_: Tensor) -> Tensor:
        """Mass and power sums of differences from the reference."""
        if not self.powers:
            return logits_.exp_().sum(1)[None]
        if self.parameters.p == 1:
            sums = first_power_sums(logits_.exp_())
            return torch.stack((sums[0], *sums))
        mass = logits_.exp().sum(1)
        return torch.stack((mass, *first_power_sums(logits_.mul_(self.parameters.p).exp_())))

    def merge(self, parts: Float[Tensor, "n k R"]) -> Float[Tensor, "k R"]:
        """The largest of all kept lists stay kept; the others join the rest's sums."""
        kept, p = self._kept, self.parameters.p
        ordered = parts[:, 1 : kept + 1].flatten(0, 1).sort(dim=0, descending=True).values
        rivals, dropped = ordered[:kept], ordered[kept:]
        best = parts[:, 1].argmax(0)
        ids = parts[:, kept + 1 : kept + 3].gather(0, best.expand(1, 2, -1))[0]
        # The first sum is the mass; the n-th after it that of the n-th power of e^(p s).
        powers = [1.0, *(n * p for n in range(1, self._powers + 1))]
        scale = exp_from(parts[:, kept], rivals[-1], 1.0)
        dropped = exp_from(dropped, rivals[-1], 1.0)
        sums = [
            (parts[:, kept + 3 + row] * scale.pow(power)).sum(0) + dropped.pow(power).sum(0)
            for row, power in enumerate(powers)
        ]
        return torch.stack((parts[:, 0].amax(0), *rivals, *ids, *sums))

    def tile_refinement(
        self, logits_: Float[Tensor, "R t"], target: TileTarget, statistics: Float[Tensor, "k R"]
    ) -> Float[Tensor, "2 R"]:
        """H and sum of log(1 - k q^p) over the classes of the tile besides label and top rival."""
        view = self._view(statistics)
        target.write_(logits_, float("-inf"))
        column, present = place_of(view.top_id, target, logits_.shape[1])
        TileTarget(column, present, target.first_id, target.local).write_(logits_, float("-inf"))
        # h = 1 / (e^-x - 1) for k q^p = e^x, and log(1 - e^x) = -log(1 + h).
        shift = self.parameters.p * view.log_mass - self._log_k
        # From the peak, exactly: at logits of 1e4 a rounded product would be 5e-4 off.
        logits_.sub_(view.peak[:, None])
        torch.add(shift[:, None], logits_, alpha=-self.parameters.p, out=logits_)
        self._minus_one_(logits_).reciprocal_()
        total = logits_.sum(1)
        return torch.stack((total, -logits_.log1p_().sum(1)))

    def values(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, " R"]:
        """The loss, its two large terms from differences of logits."""
        view = self._view(statistics)
        _, logarithms = self._sums(statistics, view)
        large = label_term(view.label_gap, self.parameters)
        large = large + label_term(view.top_gap, self.parameters)
        return (large - logarithms) / self.parameters.p

    def label_and_rival(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, "2 R"]:
        """The first two statistics."""
        return statistics[:2]

    def gradient_terms(self, statistics: Float[Tensor, "k R"]) -> Float[Tensor, "g R"]:
        """Reference of the exponentials, coefficients, the two special gradients, the top's id."""
        view = self._view(statistics)
        total, _ = self._sums(statistics, view)
        at_label = slope(view.label_gap, self.parameters)
        at_top = slope(view.top_gap, self.parameters)
        # From the smaller of the two, every exponential besides the label's and the top's is <= 1.
        # It is rounded as the tiles will subtract it, so that at logits of 1e4 no digit is lost.
        origin = view.peak + torch.minimum(view.lse_but_label, view.lse_but_top)
        reference = origin - view.peak
        coefficient = (
            at_label * (reference - view.lse_but_label).exp()
            - total * (reference - view.log_mass).exp()
            - at_top * (reference - view.lse_but_top).exp()
        )
        label_share = (view.label - view.log_mass).exp()
        top_share = (view.top - view.log_mass).exp()
        across = (view.label - view.lse_but_top).exp() * at_top
        label_gradient = -at_label - label_share * total - across
        across = (view.top - view.lse_but_label).exp() * at_label
        top_gradient = at_top - top_share * total + across
        return torch.stack(
            (
                origin,
                coefficient,
                (reference - view.log_mass).exp() * self.parameters.k,
                self.parameters.p * (view.log_mass - reference) - self._log_k,
                label_gradient,
                top_gradient,
                *statistics[self._kept + 1 : self._kept + 3],
            )
        )

    def gradient_(
        self,
        logits_: Float[Tensor, "R t"],
        target: TileTarget,
        terms: Float[Tensor, "g R"],
        upstream: Float[Tensor, " R"],
    ) -> None:
        """h_j plus a multiple of e^s_j; label and top rival are overwritten by their own."""
        reference, coefficient, share, shift, label_gradient, top_gradient = terms[:6]
        column, present = place_of(id_of(terms[6:8]), target, logits_.shape[1])
        coefficient, scaled = (coefficient * upstream)[:, None], upstream[:, None]
        pieces = _pieces(logits_)
        scratch = torch.empty_like(pieces[0])
        for part in pieces:
            odds = scratch[:, : part.shape[1]]
            part.sub_(reference[:, None])
            if self.parameters.p == 1:
                # With a = r e, a / (1 - a) = e / (1 / r - e): one exponential for both terms.
                # Single operations with one broadcast operand are twice as fast as addcmul and
                # addcdiv with three (CPU, torch 2.13, November 2026).
                torch.sub(1 / share[:, None], part.exp_(), out=odds)
                torch.div(scaled, odds, out=odds)
                part.mul_(odds.add_(coefficient))
            else:
                torch.add(shift[:, None], part, alpha=-self.parameters.p, out=odds)
                torch.div(scaled, self._minus_one_(odds), out=odds)
                part.exp_().mul_(coefficient).add_(odds)
        top = TileTarget(column, present, target.first_id, target.local)
        top.write_(logits_, top_gradient * upstream)
        target.write_(logits_, label_gradient * upstream)

    def _minus_one_(self, exponents_: Tensor) -> Tensor:
        """e^x - 1 for the x of all classes but label and top rival, where q <= 1/2.

        There x >= p log 2. Down to p = 1/4 the subtraction costs 3 bits at the most, and
        `expm1` three times the time of `exp` (CPU, torch 2.13, November 2026).
        """
        if self.parameters.p < _SMALLEST_P_OF_EXP:
            return exponents_.expm1_()
        return exponents_.exp_().sub_(1)

    def _view(self, statistics: Tensor) -> RowView:
        kept = self._kept
        return RowView.of(
            statistics[0],
            statistics[1 : kept + 1],
            statistics[kept + 3],
            statistics[kept + 1 : kept + 3],
        )

    def _sums(self, statistics: Tensor, view: RowView) -> tuple[Tensor, Tensor]:
        """H and sum of log(1 - k q^p), over all classes but label and top rival."""
        kept, p, k = self._kept, self.parameters.p, self.parameters.k
        if not self.powers:
            return statistics[kept + 4], statistics[kept + 5]
        exponents = p * (statistics[2 : kept + 1] - view.peak - view.log_mass) + self._log_k
        share = exponents.exp()
        total = (share / (1 - share)).sum(0)
        logarithms = torch.log1p(-share).sum(0)
        last = statistics[kept] - view.peak - view.log_mass
        for n in range(1, _POWERS + 1):
            term = k**n * statistics[kept + 3 + n] * (n * p * last).exp()
            total, logarithms = total + term, logarithms - term / n
        return total, logarithms


def _pieces(tile: Tensor) -> list[Tensor]:
    """Views of columns."""
    return list(tile.split(max(1, -(-tile.shape[1] // _PIECES)), dim=1))
