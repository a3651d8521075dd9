"""The parameters of paper A's losses, read as distances: k, p, and when they make a metric.

Every loss of the family is `-(1/p) * sum over coordinates of log(1 - k |x - y|^p)`: k = p = 1 is
the paper's L1 (15), anything else its L2 (16). The losses, the certificates, the distances of an
evaluation and the configuration share these values.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from dist_dml.errors import UsageError

# `K(p)` is known to rounding only: a k above it by this share counts as equal to it.
_ROUNDING = 1e-15


def largest_metric_k(p: float) -> float:
    """K(p) = 2^(p+1) - 2^(2p) = 1 - (2^p - 1)^2: the largest k of a metric (17); K(1) = 0.

    Rounds to 1 below p = 1e-8.

    >>> round(largest_metric_k(0.5), 6)
    0.828427
    """
    return 1 - math.expm1(p * math.log(2)) ** 2


@dataclass(frozen=True)
class MetricParameters:
    """k and p of `-(1/p) * sum log(1 - k |x - y|^p)`; only these two matter, not a and b.

    Raises:
        UsageError: outside 0 < p <= 1, 0 < k <= 1; the message names the inequality.
    """

    k: float
    p: float

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UsageError(
                f"p={self.p:g} breaks 0 < p <= 1 (paper A, eq. 16); choose p in (0, 1]"
            )
        if not 0 < self.k <= 1:
            raise UsageError(
                f"k={self.k:g} breaks 0 < k <= 1: log(1 - k |x - y|^p) must exist up to "
                "|x - y| = 1; choose k in (0, 1], for a metric at most K(p) = "
                f"{largest_metric_k(self.p):.6g}"
            )

    @staticmethod
    def of_offset(
        a: float,
        b: float = 1.0,
        p: float = 1.0,
        convention: Literal["main", "supplement"] = "supplement",
    ) -> MetricParameters:
        """From the paper's a and b: k = b / a (main text) or b / (1 + a) (supplement).

        The experiments of the paper use the supplement's with b = 1 (reference 2.3).

        Raises:
            UsageError: outside a >= 0, 0 < b <= 1, 0 < p <= 1, or where k would exceed 1.
        """
        if not a >= 0:
            raise UsageError(f"a={a:g} breaks a >= 0 (paper A, eq. 16); choose a >= 0")
        if not 0 < b <= 1:
            raise UsageError(f"b={b:g} breaks 0 < b <= 1 (paper A, eq. 16); choose b in (0, 1]")
        whole = a if convention == "main" else 1 + a
        if b > whole:
            raise UsageError(
                f"a={a:g}, b={b:g} break b <= a in the main text's convention: log(a - b) must "
                "exist; raise a, or use the supplement's convention (1 + a)"
            )
        return MetricParameters(b / whole, p)

    @property
    def is_metric(self) -> bool:
        """Whether the triangle inequality holds for all points: k <= K(p) (17).

        Never for k = 1, whose d(0, 1) is infinite, nor for p = 1, whatever K(p) rounds to.
        """
        return self.k < 1 and self.k <= largest_metric_k(self.p) * (1 + _ROUNDING)

    def loss_at_uniform(self, num_classes: int) -> float:
        """The loss of a row whose probabilities are all 1 / C: about where training starts.

        Natural logarithms. 14.8 at C = 10^6 with k = p = 1, and 2.9e6 with p = 0.1.
        """
        others = num_classes - 1
        if others == 0:
            return 0.0
        log_share = -math.log(num_classes)
        label = _minus_log(self.k, self.p * math.log(others / num_classes))
        return (label + others * _minus_log(self.k, self.p * log_share)) / self.p


def _minus_log(k: float, exponent: float) -> float:
    """-log(1 - k e^exponent)."""
    return -math.log(-math.expm1(math.log(k) + exponent))


@dataclass(frozen=True)
class MetricSpec:
    """A distance of an evaluation: the learned metric, or its top-k variant.

    Attributes:
        parameters: k and p at test time, whatever the training used.
        top: 0 compares whole probability vectors; T > 0 the T largest probabilities of each with
            the others taken as 0, which is another distance, and named so.
        text: as the user wrote it.
    """

    parameters: MetricParameters
    top: int
    text: str

    @property
    def name(self) -> str:
        """What its scores are called: MLflow takes no parentheses, commas or equals signs."""
        inner = "".join(self.text.removeprefix("metric").strip("()").split())
        return "metric_" + inner.replace("=", "").replace("+", "").replace(",", "_")


_FORM = re.compile(r"metric\(\s*(?:[a-z]+\s*=\s*[^,()=]+)(?:,\s*[a-z]+\s*=\s*[^,()=]+)*\s*\)")
_HOW = "write metric(p=0.1), metric(k=0.8,p=0.5), metric(a=1e-6,p=0.01) or metric(p=0.1,top=64)"


def parse_metric(text: str) -> MetricSpec:
    """Read `metric(p=0.1)`, `metric(k=0.8,p=0.5)`, `metric(a=1e-6,p=0.01)`, `metric(p=0.1,top=64)`.

    Without k and a, k is K(p), the largest that makes a metric; `a` is the supplement's, b = 1.

    Raises:
        UsageError: for another form, parameters outside the definition, or p = 1 without k or a.
    """
    if not _FORM.fullmatch(text.strip()):
        raise UsageError(f"the distance {text!r} cannot be read; {_HOW}")
    values: dict[str, float] = {}
    for part in text.strip()[len("metric(") : -1].split(","):
        key, value = (word.strip() for word in part.split("="))
        if key not in ("k", "a", "p", "top") or key in values:
            raise UsageError(f"the distance {text!r} has {key!r} unknown or twice; {_HOW}")
        try:
            values[key] = float(value)
        except ValueError:
            raise UsageError(
                f"the distance {text!r} has {key}={value}, no number; {_HOW}"
            ) from None
    if "p" not in values or ("k" in values and "a" in values):
        raise UsageError(f"the distance {text!r} needs p, and k or a or neither; {_HOW}")
    top = values.get("top", 0.0)
    if not top.is_integer() or ("top" in values and top < 1):
        raise UsageError(f"the distance {text!r} has top={top:g}; use a whole number from 1")
    p = values["p"]
    if "a" in values:
        parameters = MetricParameters.of_offset(values["a"], 1.0, p)
    elif "k" in values:
        parameters = MetricParameters(values["k"], p)
    elif p == 1:
        raise UsageError(
            f"the distance {text!r} has K(1) = 0: p = 1 is never a metric; give k (k=1 is the "
            "paper's L1) or a, for example metric(a=1e-6,p=1)"
        )
    else:
        MetricParameters(1.0, p)  # Refuses p outside (0, 1] with its own message.
        parameters = MetricParameters(largest_metric_k(p), p)
        if not parameters.is_metric:
            raise UsageError(
                f"the distance {text!r} has p so small that K(p) rounds to 1, no metric; use a "
                "larger p (below 1e-4 all different points are equally far, nearly)"
            )
    return MetricSpec(parameters, int(top), text.strip())
