"""How near pairs of one class and of two classes are, and what a threshold makes of them.

Dimensions: `b` bins of the count, `s` bins that are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int64

from dist_dml.report.figure_folder import FigureFolder
from dist_dml.report.page import Html, element, joined, paragraph, table
from dist_dml.report.pictures import dress, new_figure
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.pair_counts import PairCounts, pair_totals
from dist_dml.retrieval.report import HIT_COLOUR, INK, MISS_COLOUR
from dist_dml.retrieval.verification import Verification, verify_pairs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_BARS = 100
FALSE_ACCEPT_RATES = (1e-1, 1e-2, 1e-3, 1e-4)
_DRAWN_RATE = 1e-3


@dataclass(frozen=True)
class Bars:
    """Shares of all pairs of a kind, by value. What is beyond the last edge is not among them."""

    genuine: Float64[np.ndarray, " s"]
    impostor: Float64[np.ndarray, " s"]
    edges: Float64[np.ndarray, " s+1"]
    impostor_beyond: float
    """Share of the impostor pairs that are farther than any genuine pair; 0 for a similarity."""


def bars_of(counts: PairCounts, larger_is_nearer: bool, num_bars: int = NUM_BARS) -> Bars:
    """About `num_bars` equal bars over the values that occur; sums over them lose no pair.

    For a distance the last bin also holds every impostor beyond the farthest genuine pair: it is
    told apart, as a bar of it would dwarf all others.
    """
    genuine, impostor = counts.genuine.astype(np.float64), counts.impostor.astype(np.float64)
    genuine, impostor = genuine / genuine.sum(), impostor / impostor.sum()
    beyond = 0.0
    if not larger_is_nearer:
        beyond, impostor = float(impostor[-1]), np.append(impostor[:-1], 0.0)
    met = np.flatnonzero((genuine > 0) | (impostor > 0))
    first, last = int(met[0]), int(met[-1]) + 1
    step = max(1, -(-(last - first) // num_bars))
    starts = np.arange(first, last, step)
    ends = np.minimum(starts + step, len(genuine))
    edges = np.append(counts.edges[starts], counts.edges[ends[-1]])
    return Bars(_sums(genuine, starts, ends), _sums(impostor, starts, ends), edges, beyond)


def _sums(
    values: Float64[np.ndarray, " b"],
    starts: Int64[np.ndarray, " s"],
    ends: Int64[np.ndarray, " s"],
) -> Float64[np.ndarray, " s"]:
    added = np.concatenate([[0.0], np.cumsum(values)])
    return added[ends] - added[starts]


def pair_figure(found: Verification, distance: Distance) -> Figure:
    """Left the two histograms with the thresholds, right TAR over FAR."""
    figure = new_figure(10.2, 3.7)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    bars = bars_of(found.counts, found.larger_is_nearer)
    for values, colour, name in (
        (bars.impostor, MISS_COLOUR, "different classes"),
        (bars.genuine, HIT_COLOUR, "same class"),
    ):
        left.stairs(values, bars.edges, fill=True, color=colour, alpha=0.35)
        left.stairs(values, bars.edges, color=colour, linewidth=1.3, label=name)
    for value, style, name in _marks(found):
        left.axvline(value, color=INK, linewidth=1.1, linestyle=style, label=name)
    axis = "cosine of a pair" if distance.larger_is_nearer else "squared l2 distance of a pair"
    dress(left, "Pairs of the same and of different classes", axis, "share of the pairs of a kind")
    left.set_ylim(bottom=0)
    left.legend(frameon=False, fontsize=8, loc="best")
    fewest = 1.0 / max(1, int(found.counts.impostor.sum()))
    shown = found.far >= fewest
    right.plot(found.far[shown], found.tar[shown], color=INK, linewidth=1.8)
    right.set_xscale("log")
    right.set_ylim(0, 1.02)
    dress(right, "What thresholds accept", "FAR: share of wrong pairs", "TAR: share of right pairs")
    return figure


def _marks(found: Verification) -> list[tuple[float, str, str]]:
    best, accuracy = found.best_threshold()
    marks = [(best, "-", f"best threshold {best:.3g} (balanced accuracy {accuracy:.1%})")]
    at_rate = found.threshold_at_far(_DRAWN_RATE)
    if at_rate is not None:
        marks.append((at_rate, "--", f"FAR {_DRAWN_RATE:g}: {at_rate:.3g}"))
    return marks


def threshold_rows(
    found: Verification, rates: Sequence[float] = FALSE_ACCEPT_RATES
) -> list[tuple[str, str, str]]:
    """(what, threshold, what it gives) for the table."""
    best, accuracy = found.best_threshold()
    rows = [("best balanced accuracy", f"{best:.4g}", f"{accuracy:.2%} right")]
    for rate in rates:
        threshold, accepted = found.threshold_at_far(rate), found.tar_at_far(rate)
        if threshold is None or accepted is None:
            rows.append((f"FAR {rate:g}", "\u2013", "too few wrong pairs to tell"))
        else:
            rows.append((f"FAR {rate:g}", f"{threshold:.4g}", f"TAR {accepted:.2%}"))
    rows.append(("equal error rate", "\u2013", f"{found.equal_error_rate():.2%}"))
    rows.append(("area under the ROC curve", "\u2013", f"{found.roc_auc():.4f}"))
    return rows


def pairs_body(
    queries: Embeddings,
    gallery: Embeddings | None,
    distance: Distance,
    seed: int,
    figures: FigureFolder,
    found: Verification | None = None,
) -> Html:
    """Similarities of pairs and thresholds on them; by cosine or l2.

    Args:
        queries: one side of the pairs.
        gallery: the other; None pairs the queries among themselves.
        distance: `cosine` or `l2`.
        seed: of the draw, where there are too many pairs.
        figures: where the picture goes.
        found: of `verify_pairs` with these arguments, where it is known: it costs seconds.
    """
    totals = pair_totals(queries, gallery)
    if not totals.genuine or not totals.impostor:
        kind = "the same class" if not totals.genuine else "different classes"
        return paragraph(f"There is no pair of {kind}, so no threshold to speak of.", "empty")
    if found is None:
        found = verify_pairs(queries, gallery, distance, seed)
    looked = (len(found.counts.genuine_values), int(found.counts.impostor.sum()))
    text = (
        f"{looked[0]:,} pairs of one class and {looked[1]:,} of two classes by {distance.name}"
        f"{', drawn by the seed from more' if found.is_sampled else ', which are all'}. A pair is "
        "accepted that is at least as near as the threshold; TAR and FAR are the shares of right "
        "and of wrong pairs that are."
    )
    beyond = bars_of(found.counts, found.larger_is_nearer).impostor_beyond
    if beyond:
        text += f" {beyond:.1%} of the wrong pairs are farther than any right one and not drawn."
    picture = figures.add(
        "pairs",
        pair_figure(found, distance),
        "Histogram of pairs of the same and of different classes with thresholds, and TAR over FAR",
    )
    numbers = table(("threshold for", "value", "gives"), threshold_rows(found))
    return joined((paragraph(text, "note"), element("div", picture, numbers, class_="figures")))
