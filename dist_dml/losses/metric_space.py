"""Paper A's classification losses read as distances: which are metrics, and what they guarantee.

Every loss of the family is `L(x, y) = F(sum_i d(x_i, y_i))` (paper A, eq. 7) of two probability
vectors, with `d(s, t) = -(1/p) log(1 - k |s - t|^p)` in each coordinate: k = p = 1 is L1 (15),
anything else L2 (16). Trained as a classification loss and measured between two images, one and
the same function bounds the distances within and between classes (Lemmas 3 and 4).

Two facts go beyond the paper; both are proven here and tested:

- L2 with any 0 < k <= 1 is a weak-metric through every one-hot label. Through s = 0 and s = 1,
  `|x - z|^p <= max(x, z)^p <= x^p + z^p - k x^p z^p`, the triangle inequality in one coordinate.
- `F(t) = 1 - exp(-t)` makes every k a metric, L1 included. With a = |x - y|^p and b = |y - z|^p,
  `D = 1 - prod_i (1 - k a_i)` is the probability that one of independent events of probabilities
  k a_i happens. Take an event k b_i apart from it for each i (as far as k a_i + k b_i <= 1): none
  of all happens with probability prod(1 - k a_i - k b_i) >= prod(1 - k a_i) + prod(1 - k b_i) - 1,
  and |x - z|^p <= a + b. So D is a metric, and `1 - exp(-sum d) = 1 - (1 - D)^(1/p)` is an
  increasing concave function of D, 0 at 0.

Dimensions: n and m rows, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dist_dml.errors import UsageError
from dist_dml.losses.outer import IDENTITY, Outer
from dist_dml.metric_parameters import MetricParameters, largest_metric_k

_LOG_2 = math.log(2)


@dataclass(frozen=True)
class Tier:
    """How much of the triangle inequality is shown to hold.

    Attributes:
        name: "semi": none; "weak": through the uniform points (Def. 3); "metric": all of it.
        uniform_points: the points y with L(x, z) <= L(x, y) + L(y, z) for all x and z, in words.
        why: the numbers that decide.
    """

    name: Literal["semi", "weak", "metric"]
    uniform_points: str
    why: str


@dataclass(frozen=True)
class MetricLoss:
    """`L(x, y) = F(sum_i d(x_i, y_i))`, `d(s, t) = -(1/p) log(1 - k |s - t|^p)`.

    Natural logarithms. Results have the dtype of the input: float32 or float64.

    Attributes:
        parameters: k and p.
        outer: F. All bounds, and the epsilon they are given, are distances with F included.
    """

    parameters: MetricParameters
    outer: Outer = IDENTITY

    @staticmethod
    def l1(outer: Outer = IDENTITY) -> MetricLoss:
        """L1 (15), k = p = 1: binary cross-entropy over softmax probabilities. May be infinite."""
        return MetricLoss(MetricParameters(1.0, 1.0), outer)

    @staticmethod
    def l2(k: float, p: float, outer: Outer = IDENTITY) -> MetricLoss:
        """L2 (16). Raises UsageError outside 0 < k <= 1, 0 < p <= 1."""
        return MetricLoss(MetricParameters(k, p), outer)

    @staticmethod
    def of_offset(
        a: float,
        b: float = 1.0,
        p: float = 1.0,
        convention: Literal["main", "supplement"] = "supplement",
        outer: Outer = IDENTITY,
    ) -> MetricLoss:
        """L2 from the paper's a and b; see `MetricParameters.of_offset`."""
        return MetricLoss(MetricParameters.of_offset(a, b, p, convention), outer)

    def coordinate(
        self, x: Float[Tensor, "*#shape"], y: Float[Tensor, "*#shape"]
    ) -> Float[Tensor, "..."]:
        """d(x, y) elementwise, of probabilities in [0, 1], without F.

        The definition itself. It cannot be better than its arguments: `distance` and `to_label`
        start from log-probabilities, which still tell 1e-30 from 0 and 1 - 1e-30 from 1.
        """
        difference = (x - y).abs()
        return self._terms(difference.log(), torch.log1p(-difference))

    def distance(
        self, log_x: Float[Tensor, "n C"], log_y: Float[Tensor, "m C"]
    ) -> Float[Tensor, "n m"]:
        """L between all pairs of rows of log-probabilities: the dense twin of faster searches.

        Costs about twelve arrays of n * m * C numbers. Not differentiable where two rows have an
        equal coordinate (nor is |x - y|^p for p < 1).

        The largest probability of a confident row rounds to 1, and so would the difference of two
        to 0; with p = 0.1 a true difference of 1e-20 still counts 1% of one of 1. Above one half
        the coordinate is therefore carried by `log(1 - x_i)`, the sum of the row's others.
        """
        x, y = log_x[:, None], log_y[None]
        rest_x, rest_y = log_complements(log_x)[:, None], log_complements(log_y)[None]
        high_x, high_y = x > -_LOG_2, y > -_LOG_2
        # On different sides of one half, 1 - |x - y| = (1 - high) + low: nothing cancels.
        small_x, small_y = torch.where(high_x, rest_x, x), torch.where(high_y, rest_y, y)
        across = torch.logaddexp(small_x, small_y).clamp(max=0)
        same_side = _log_abs_difference(small_x, small_y)
        is_across = high_x ^ high_y
        log_difference = torch.where(is_across, _log_one_minus_exp(across), same_side)
        log_rest = torch.where(is_across, across, _log_one_minus_exp(same_side))
        return self.outer.function(self._terms(log_difference, log_rest).sum(2))

    def to_label(
        self, log_x: Float[Tensor, "n C"], labels: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """L between each row and the one-hot vector of its label: epsilon_i of a certificate.

        Equal to `distance` to that vector; O(C) a row. In the label's coordinate |x - 1| is the
        sum of the other probabilities. Differentiable wherever it is finite.
        """
        column = labels[:, None]
        rest = log_complements(log_x)
        # To a one-hot vector: |x_j - 0| = x_j elsewhere, |x_y - 1| = 1 - x_y at the label.
        log_difference = log_x.scatter(1, column, rest.gather(1, column))
        log_rest = rest.scatter(1, column, log_x.gather(1, column))
        return self.outer.function(self._terms(log_difference, log_rest).sum(1))

    def _terms(self, log_difference: Tensor, log_rest: Tensor) -> Tensor:
        """d from log|s - t| and log(1 - |s - t|): the smaller of the two has to be accurate."""
        k, p = self.parameters.k, self.parameters.p
        is_high = log_rest < -_LOG_2
        from_rest = _log_one_minus_exp(torch.where(is_high, log_rest, -1.0))
        log_difference = torch.where(is_high, from_rest, log_difference)
        exponent = math.log(k) + p * log_difference
        # Where k |s - t|^p <= 1/2, log1p keeps all digits. Beyond, with r = 1 - |s - t|,
        # 1 - k |s - t|^p = (1 - k) + k (1 - (1 - r)^p), whose terms are all positive; below the
        # dtype's resolution 1 - (1 - r)^p is p r, which may lie below the smallest number.
        is_close = exponent > -_LOG_2
        is_tiny = log_rest < math.log(torch.finfo(log_rest.dtype).eps)
        safe_difference = torch.where(is_close & ~is_tiny, p * log_difference, -1.0)
        gap = torch.where(is_tiny, math.log(p) + log_rest, _log_one_minus_exp(safe_difference))
        floor = torch.full_like(gap, math.log1p(-k) if k < 1 else -math.inf)
        beyond = torch.logaddexp(floor, math.log(k) + torch.where(is_close, gap, -1.0))
        below = torch.log1p(-torch.where(is_close, -1.0, exponent).exp())
        return torch.where(is_close, beyond, below) / -p

    @property
    def vertex_distance(self) -> float:
        """M = d(0, 1) = -(1/p) log(1 - k), without F; inf for k = 1."""
        k, p = self.parameters.k, self.parameters.p
        return -math.log1p(-k) / p if k < 1 else math.inf

    @property
    def label_separation(self) -> float:
        """F(2M): the distance of any two different one-hot labels (Lemma 1)."""
        inner = torch.tensor(2 * self.vertex_distance, dtype=torch.float64)
        return float(self.outer.function(inner))

    @property
    def is_metric(self) -> bool:
        """Whether the triangle inequality is shown for all points."""
        every_k = self.outer.makes_every_k_a_metric
        return self.outer.is_concave and (every_k or self.parameters.is_metric)

    def tier(self) -> Tier:
        """Semi, weak or metric, and why.

        With F = t, "metric" is said if and only if it is one (17). A concave F may make a metric
        of a weak one beyond what is said here (`SATURATION` does for every k, and is said to).
        """
        k, p, outer = self.parameters.k, self.parameters.p, self.outer
        largest = largest_metric_k(p)
        numbers = f"k = {k:.9g}, p = {p:g}, K(p) = {largest:.9g}, M = {self.vertex_distance:.6g}"
        if not outer.is_concave:
            why = f"F = {outer.name} is not concave: it may break the triangle inequality"
            return Tier("semi", "none is known", f"{why} ({numbers})")
        if self.parameters.is_metric:
            why = f"k <= K(p) and F = {outer.name} is concave (paper A, eq. 17 and Lemma 2)"
            return Tier("metric", "every point", f"{why} ({numbers})")
        if outer.makes_every_k_a_metric:
            why = f"k > K(p), but F = {outer.name} makes every k a metric"
            return Tier("metric", "every point", f"{why} ({numbers})")
        why = (
            f"k > K(p): half way between 0 and 1 breaks the triangle inequality of d; through 0 "
            f"and 1 it holds for every k, and F = {outer.name} is concave"
        )
        return Tier("weak", "every one-hot label", f"{why} ({numbers})")

    def intra_bound(self, epsilon: float) -> float:
        """2 epsilon: no two samples of one class are farther apart (Lemma 3).

        For samples with L to their own label at most `epsilon`, F included. By pairs:
        L(a, b) <= epsilon_a + epsilon_b. A concave F makes the statement weaker, never wrong: the
        sum inside alone gives F(2 F^-1(epsilon)) <= 2 epsilon.

        Raises:
            UsageError: if F is not concave: nothing is shown through the labels.
        """
        if not self.outer.is_concave:
            raise UsageError(
                f"no bound within classes: F = {self.outer.name} is not concave, which Lemma 3 of "
                "paper A needs (through Lemma 2); choose a concave F"
            )
        return 2 * epsilon

    def inter_bound(self, epsilon: float) -> float:
        """F(2M) - 2 epsilon: no two samples of different classes are nearer (Lemma 4).

        Says nothing where it is negative. By pairs: L(a, b) >= F(2M) - epsilon_a - epsilon_b. Under
        a concave F this, too, is weaker than the sum inside alone, F(2M - 2 F^-1(epsilon)).

        Raises:
            UsageError: if the loss is not known to be a metric.
        """
        self._require_metric("no bound between classes")
        return self.label_separation - 2 * epsilon

    @property
    def certified_below(self) -> float:
        """F(2M) / 4. Samples nearer than this to their own label are separated by class.

        For any two of them, L(a, b) < F(2M) / 2 within a class (Lemma 3) and L(a, b) > F(2M) / 2
        between classes (Lemma 4): every distance within is below every distance between. They are
        also classified correctly: a label of another class is farther away.

        With F = t this is M / 2. F never changes an order, so that F(M / 2) >= F(2M) / 4 would do
        as well when k <= K(p); the lemmas as printed give the smaller.

        Raises:
            UsageError: if the loss is not known to be a metric.
        """
        self._require_metric("nothing is certified")
        return self.label_separation / 4

    def _require_metric(self, what: str) -> None:
        if not self.outer.is_concave:
            raise UsageError(
                f"{what}: F = {self.outer.name} is not concave, which Lemma 2 of paper A needs; "
                "choose a concave F"
            )
        if not self.is_metric:
            k, p = self.parameters.k, self.parameters.p
            raise UsageError(
                f"{what}: k={k:.9g} breaks k <= K(p) = {largest_metric_k(p):.9g} at p={p:g} (paper "
                "A, eq. 17), so that this is no metric; lower k or p"
            )


def _log_one_minus_exp(u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 - e^u) for u <= 0, with all digits on both ends; -inf at u = 0."""
    is_near = u > -_LOG_2
    # Both branches are evaluated everywhere: harmless stand-ins keep nan out of the gradients.
    near = torch.log(-torch.expm1(torch.where(is_near, u, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(is_near, -1.0, u)))
    return torch.where(is_near, near, far)


def log_complements(log_x: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """log(1 - x_i) of every coordinate of rows of log-probabilities.

    A probability above one half is its row's largest: its complement is the sum of the others,
    because 1 - x_i itself is lost in x_i's rounding. O(C) a row.
    """
    top = log_x.argmax(1, keepdim=True)
    log_top = log_x.gather(1, top)
    others = log_x.scatter(1, top, -math.inf).logsumexp(1, keepdim=True)
    is_high = log_top > -_LOG_2
    at_top = torch.where(is_high, others, _log_one_minus_exp(torch.where(is_high, -1.0, log_top)))
    return _log_one_minus_exp(log_x.scatter(1, top, -1.0)).scatter(1, top, at_top)


def _log_abs_difference(a: Tensor, b: Tensor) -> Tensor:
    """log|e^a - e^b|; -inf where they are equal, both -inf included."""
    gap = torch.where(a == b, 0.0, (a - b).abs())
    return torch.maximum(a, b) + _log_one_minus_exp(-gap)
