"""The picture of certificates: how far samples are from their labels, and what that guarantees.

Dimensions: n samples.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dist_dml.errors import UsageError
from dist_dml.losses.metric_space import MetricLoss
from dist_dml.losses.outer import IDENTITY
from dist_dml.retrieval.certificates import Certificate, Epsilons, Flags, certify, short_number
from dist_dml.retrieval.report import HIT_COLOUR, INK, MISS_COLOUR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THRESHOLD_COLOUR = "#0072b2"
MOST_CURVE_POINTS = 1000


def certificate_figure(
    samples: Mapping[str, tuple[Epsilons, Flags, MetricLoss]],
    title: str = "Certified separation of known classes",
) -> Figure:
    """One row for each distance: how far samples are from their labels, and what that guarantees.

    Left the cumulative distribution of epsilon on a log axis, correct and wrong samples apart, as
    shares of all samples: the curve of the correct ones crosses F(2M) / 4 at the certified share.
    Right the same in words. Infinite values are counted and never reached by a curve.

    Raises:
        UsageError: if `samples` is empty, or one has no sample.
    """
    from matplotlib.figure import Figure

    if not samples:
        raise UsageError("no certificate to draw; name metrics in evaluation.certificates")
    height = 3.2 * len(samples) + 1.1
    figure = Figure(figsize=(10.5, height), dpi=110, facecolor="white")

    def write(x: float, y: float, text: str, size: float, weight: str = "normal") -> None:
        # A dollar sign in a name is no formula.
        figure.text(
            x, y / height, text, fontsize=size, weight=weight, va="top", color=INK, parse_math=False
        )

    write(0.03, height - 0.15, title, 13, "bold")
    write(
        0.03,
        height - 0.45,
        "epsilon is the distance of a held-out sample to the label of its class. Below F(2M)/4, a "
        "quarter of the distance of two labels, it is certified.",
        8.5,
    )
    for i, (name, (epsilon, correct, loss)) in enumerate(samples.items()):
        bottom = height - 0.7 - 3.2 * (i + 1) + 0.55
        axes = figure.add_axes((0.075, bottom / height, 0.52, 2.15 / height))
        certificate = certify(epsilon, correct, loss)
        _draw_distribution(axes, epsilon, correct, certificate, loss.outer == IDENTITY)
        axes.set_title(name, loc="left", weight="bold", fontsize=10, pad=16, parse_math=False)
        caption = "\n\n".join(textwrap.fill(text, 54) for text in _explain(certificate, loss))
        write(0.625, bottom + 2.15, caption, 8.5)
    write(
        0.03,
        0.3,
        "The guarantees hold for the samples measured here, of classes known from training. "
        "Nothing is promised for classes that were not trained.",
        8.5,
    )
    return figure


def _draw_distribution(
    axes: Axes, epsilon: np.ndarray, correct: np.ndarray, certificate: Certificate, is_plain: bool
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    below, separation = certificate.certified_below, certificate.label_separation
    finite = epsilon[np.isfinite(epsilon) & (epsilon > 0)].astype(np.float64)
    marks = [] if below is None else [below, separation]
    # The lowest thousandth of the samples may stand at the edge: one at 1e-30 squeezes all others.
    ends = [*(np.quantile(finite, (0.001, 1)) if len(finite) else ()), *marks]
    low, high = (min(ends) / 1.5, max(ends) * 1.5) if ends else (0.1, 1.0)
    groups = (("correct", correct, HIT_COLOUR, "-"), ("wrong", ~correct, MISS_COLOUR, "--"))
    for name, chosen, colour, style in groups:
        values = np.sort(epsilon[chosen].astype(np.float64))
        reached = np.isfinite(values).sum()
        kept = np.unique(np.linspace(0, max(reached - 1, 0), MOST_CURVE_POINTS).astype(int))
        kept = kept[:reached]
        x = np.concatenate([[low], np.clip(values[kept], low, None), [high]])
        y = np.concatenate([[0.0], (kept + 1) / len(epsilon), [reached / len(epsilon)]])
        label = f"{name} ({chosen.mean():.1%})"
        if reached < len(values):
            label += f", {(len(values) - reached) / len(epsilon):.1%} infinite"
        axes.step(x, y, where="post", color=colour, linestyle=style, linewidth=1.8, label=label)
    if below is not None:
        share = certificate.certified_share or 0.0
        axes.axvspan(low, below, color=THRESHOLD_COLOUR, alpha=0.1, linewidth=0)
        axes.plot([low, below], [share, share], color=THRESHOLD_COLOUR, linewidth=1, linestyle=":")
        axes.plot([below], [share], "o", color=THRESHOLD_COLOUR, markersize=4)
        middle = "M" if is_plain else "F(2M)/2"
        # Outwards, as the two may be close.
        for place, text, side in ((below, "F(2M)/4 ", "right"), (separation / 2, middle, "left")):
            axes.axvline(place, color=THRESHOLD_COLOUR, linewidth=1)
            axes.text(
                place, 1.02, text, color=THRESHOLD_COLOUR, fontsize=8, ha=side, va="bottom",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
        # Above its line and left of the threshold, where no curve can be.
        axes.annotate(
            f"{share:.1%} certified", (below, share), (-6, 3),
            textcoords="offset points", ha="right", color=THRESHOLD_COLOUR, fontsize=8.5,
        )  # fmt: skip
    axes.set(xscale="log", xlim=(low, high), ylim=(0, 1.12))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("epsilon: distance to the own label", fontsize=8.5)
    axes.set_ylabel("share of all samples", fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left")


def _explain(certificate: Certificate, loss: MetricLoss) -> list[str]:
    """The guarantees in plain words, one paragraph each."""
    k, p = loss.parameters.k, loss.parameters.p
    head = f"{certificate.tier.capitalize()}: k = {k:.6g}, p = {p:g}, F = {loss.outer.name}."
    texts = [head]
    if certificate.certified_share is not None:
        half = short_number(certificate.label_separation / 2)
        texts.append(
            f"{certificate.certified_share:.1%} of all samples are certified. Any two of them are "
            f"nearer than {half} = F(2M)/2 if they are of one class, and farther if not."
        )
    if certificate.epsilon is None:
        return [*texts, "No sample is classified correctly."]
    q99 = short_number(certificate.quantiles["q99"])
    measured = f"epsilon = {short_number(certificate.epsilon)} (99% within {q99})"
    if certificate.tier == "semi":
        return [*texts, f"{measured}. No triangle inequality is known: nothing is guaranteed."]
    within = f"no two of one class are farther apart than {short_number(certificate.intra_bound)}"
    if certificate.tier == "weak":
        text = f"All correctly classified samples: {measured}; {within}."
        return [*texts, text, "A weak-metric guarantees nothing about different classes."]
    if certificate.inter_bound is None or certificate.inter_bound <= 0:
        between = "nothing about different classes, because epsilon is too large"
    else:
        between = f"no two of different classes nearer than {short_number(certificate.inter_bound)}"
    texts.append(f"All correctly classified samples: {measured}; {within}; {between}.")
    if certificate.theorem_applies:
        texts.append("Hence classes are separated for all of them, not only for the certified.")
    return texts
