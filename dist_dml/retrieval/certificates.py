"""Certificates: what a metric loss guarantees about distances, from samples of known classes.

Each held-out sample i of a training class has `epsilon_i`, the distance of its probabilities to
the one-hot vector of its label. From these alone, and not from any pair, paper A bounds the
distance of every two samples (Lemmas 3 and 4). A certificate speaks of the samples it was measured
on; it says nothing about other samples, nor about classes that were not trained.

Dimensions: n samples.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32

from dist_dml.errors import RunError, UsageError
from dist_dml.losses.metric_space import MetricLoss

Epsilons = Float32[np.ndarray, " n"]
Flags = Bool[np.ndarray, " n"]


@dataclass(frozen=True)
class Certificate:
    """What was measured, and what follows from it. None: not claimed, or nothing to measure.

    All distances include the loss's outer function F. Infinite values stay infinite.
    """

    tier: Literal["semi", "weak", "metric"]
    num_samples: int
    accuracy: float
    """Share of all samples that are classified correctly."""
    epsilon: float | None
    """The largest epsilon_i of the correctly classified samples (Def. 5); None if there is none."""
    quantiles: Mapping[str, float]
    """By name (q50, q90, q99): the smallest value that this share of the correctly classified
    samples does not exceed. An actual sample's value: interpolation has no place beside inf.
    """
    vertex_distance: float
    """M = d(0, 1)."""
    label_separation: float
    """F(2M): the distance of two labels."""
    intra_bound: float | None
    """2 epsilon: correctly classified samples of one class are no farther apart (Lemma 3)."""
    inter_bound: float | None
    """F(2M) - 2 epsilon: those of different classes are no nearer (Lemma 4); for metrics only.

    A negative bound is true and says nothing.
    """
    certified_below: float | None
    """F(2M) / 4; see `MetricLoss.certified_below`. For metrics only."""
    certified_share: float | None
    """Share of *all* samples, wrong ones included, that are correct and below `certified_below`.

    Among these samples every distance within a class is below F(2M) / 2, and every distance
    between classes above it. For metrics only.
    """

    @property
    def theorem_applies(self) -> bool:
        """Whether the two bounds separate *all* correctly classified samples by class (11)."""
        if self.intra_bound is None or self.inter_bound is None:
            return False
        return self.intra_bound < self.inter_bound

    def scores(self) -> dict[str, float]:
        """Numbers to log, by names that stay.

        What is not claimed is left out, and so is what is infinite (k = 1 has M = inf, and a
        sample may be infinitely far from its label): neither JSON nor MLflow takes it, and any
        number in its place would look like a measurement.
        """
        values = {
            "epsilon": self.epsilon,
            **{f"epsilon_{name}": value for name, value in self.quantiles.items()},
            "vertex_distance": self.vertex_distance,
            "label_separation": self.label_separation,
            "intra_bound": self.intra_bound,
            "inter_bound": self.inter_bound,
            "certified_share": self.certified_share,
            "accuracy": self.accuracy,
        }
        return {
            name: value
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }


def certify(epsilon: Epsilons, correct: Flags, loss: MetricLoss) -> Certificate:
    """The certificate of samples with known labels.

    Args:
        epsilon: each sample's `MetricLoss.to_label`, F included; may be inf.
        correct: whether each is classified correctly.
        loss: the distance, whatever loss was trained.

    Raises:
        UsageError: if there is no sample.
        RunError: if a value is nan.
    """
    if len(epsilon) == 0:
        raise UsageError(
            "a certificate needs samples and got none; evaluation.certificate_split must name a "
            "split with held-out images of training classes"
        )
    if np.isnan(epsilon).any():
        raise RunError(
            f"{int(np.isnan(epsilon).sum())} of {len(epsilon)} distances to labels are nan: "
            "the model's outputs are not finite"
        )
    ordered = np.sort(epsilon[correct].astype(np.float64))
    largest = float(ordered[-1]) if len(ordered) else None
    tier = loss.tier().name
    is_bounded = largest is not None and tier != "semi"
    # inf - inf, where a sample and the labels are infinitely far, is no bound.
    has_inter = largest is not None and math.isfinite(largest) and tier == "metric"
    below = loss.certified_below if tier == "metric" else None
    share = None if below is None else float((correct & (epsilon < below)).mean())
    return Certificate(
        tier=tier,
        num_samples=len(epsilon),
        accuracy=float(correct.mean()),
        epsilon=largest,
        quantiles={f"q{percent}": _quantile(ordered, percent) for percent in (50, 90, 99)}
        if len(ordered)
        else {},
        vertex_distance=loss.vertex_distance,
        label_separation=loss.label_separation,
        intra_bound=loss.intra_bound(largest) if is_bounded and largest is not None else None,
        inter_bound=loss.inter_bound(largest) if has_inter and largest is not None else None,
        certified_below=below,
        certified_share=share,
    )


def _quantile(ordered: np.ndarray, percent: int) -> float:
    """Of sorted values; whole numbers keep 0.9 * 10 from rounding up to the tenth value."""
    return float(ordered[-(-percent * len(ordered) // 100) - 1])


COLUMNS = {
    "tier": lambda c: c.tier,
    "accuracy": lambda c: f"{c.accuracy:.4f}",
    "epsilon": lambda c: short_number(c.epsilon),
    "50%": lambda c: short_number(c.quantiles.get("q50")),
    "90%": lambda c: short_number(c.quantiles.get("q90")),
    "99%": lambda c: short_number(c.quantiles.get("q99")),
    "M": lambda c: short_number(c.vertex_distance),
    "F(2M)": lambda c: short_number(c.label_separation),
    "within <=": lambda c: short_number(c.intra_bound),
    "between >=": lambda c: short_number(c.inter_bound),
    "certified": lambda c: "-" if c.certified_share is None else f"{c.certified_share:.1%}",
}
LEGEND = (
    "epsilon: the largest distance of a correctly classified sample to its own label; 50%, 90%, "
    "99%: that share of them is no farther.",
    "M: the distance d(0, 1) of one coordinate. F(2M): the distance of any two labels.",
    "within: two correctly classified samples of one class are at most so far apart (2 epsilon).",
    "between: two of different classes are at least so far apart (F(2M) - 2 epsilon). A negative "
    "number says nothing.",
    "certified: share of all samples nearer to their label than F(2M) / 4. Any two of these are "
    "nearer than F(2M) / 2 if they are of one class, and farther if they are not.",
    "tier: 'metric' has all of this; 'weak' has no bound between classes ('-'); 'semi' has none.",
    "All of it holds for the samples measured here, of classes known from training. Nothing is "
    "promised for other samples or for classes that were not trained.",
)


def certificate_text(certificates: Mapping[str, Certificate]) -> str:
    """A table of certificates by the names of their distances, and what its columns mean."""
    lines = [["", *COLUMNS]]
    for name, certificate in certificates.items():
        lines.append([name, *(cell(certificate) for cell in COLUMNS.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    table.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    notes = [textwrap.fill(f"- {note}", 100, subsequent_indent="  ") for note in LEGEND]
    return "\n".join([*table, "", *notes])


def short_number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None else f"{value:.4g}"
