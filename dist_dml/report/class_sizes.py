"""Scores against the size of the class: are rare classes found worse?

Dimensions: `q` queries, `c` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int64

from dist_dml.report.pictures import dress, new_figure
from dist_dml.retrieval.groups import GroupScores
from dist_dml.retrieval.metrics import QueryScores
from dist_dml.retrieval.report import LINE_COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES_DRAWN = 3000


@dataclass(frozen=True)
class ClassPoints:
    """Each class with its size and the mean score of its queries."""

    labels: Int64[np.ndarray, " c"]
    size: Float64[np.ndarray, " c"]
    recall_at_1: Float64[np.ndarray, " c"]


def ends_of(group: GroupScores) -> tuple[int, int]:
    """The smallest and the largest size of a group of `scores_by_class_size`: `4-7`, or `1`."""
    low, _, high = group.name.partition("-")
    return int(low), int(high or low)


def class_points(scores: QueryScores, sizes: Int64[np.ndarray, " q"]) -> ClassPoints:
    """The mean Recall@1 of each class with answerable queries, by ascending label.

    Args:
        scores: of all queries.
        sizes: of each query's class, as from `groups.class_sizes`.
    """
    kept = scores.has_match
    labels, place, counts = np.unique(
        scores.query_label[kept], return_inverse=True, return_counts=True
    )
    recall = np.bincount(place, scores.precision_at_1[kept], len(labels)) / counts
    size = np.bincount(place, sizes[kept], len(labels)) / counts
    return ClassPoints(labels, size, recall)


def class_size_figure(groups: Sequence[GroupScores], points: ClassPoints, seed: int) -> Figure:
    """One dot a class (at most 3,000, drawn by `seed`), and the means of the groups above them.

    Dots are spread a little, as most classes share few values. Groups without scores are left out;
    there must be one with.
    """
    groups = [group for group in groups if group.scores]
    figure = new_figure(6.6, 3.7)
    axes = figure.add_subplot()
    draw = np.random.default_rng(seed)
    shown = draw.permutation(len(points.size))[:MOST_CLASSES_DRAWN]
    x = points.size[shown] * 2 ** draw.uniform(-0.12, 0.12, len(shown))
    y = points.recall_at_1[shown] + draw.uniform(-0.012, 0.012, len(shown))
    axes.scatter(x, y, s=7, color="#8a8f98", alpha=0.35, linewidths=0, label="one class")
    ends = [ends_of(group) for group in groups]
    middle = [np.sqrt(low * high) for low, high in ends]
    for score, name, colour, marker in (
        ("recall_at_1", "Recall@1", LINE_COLOURS[0], "o"),
        ("map_at_r", "MAP@R", LINE_COLOURS[1], "s"),
    ):
        values = [group.scores[score] for group in groups]
        axes.plot(middle, values, color=colour, marker=marker, linewidth=2, label=name)
    axes.set_xscale("log", base=2)
    low, high = ends[0][0], ends[-1][1]
    ticks = [2**power for power in range(int(np.log2(low)), int(np.log2(high)) + 2)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low / 1.3, high * 1.3)
    axes.set_ylim(-0.03, 1.05)
    dress(axes, "Scores against class size", "gallery images of the class", "mean of its queries")
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure
