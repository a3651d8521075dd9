"""How far classes reach, and how far the next class is: covering radii (paper C, 4.11).

Dimensions: `n` images, `c` classes, `D` features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float64, Int64

from dist_dml.losses.diagnostics import covering_radius, inter_class_distance, whole_classes
from dist_dml.report.pictures import dress, new_figure
from dist_dml.retrieval.distances import Vectors
from dist_dml.retrieval.report import HIT_COLOUR, MISS_COLOUR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ROWS = 2048
_NO_LABEL = -1


@dataclass(frozen=True)
class Reach:
    """Classes of two images or more, in Euclidean distances of what was given."""

    labels: Int64[np.ndarray, " c"]
    radius: Float64[np.ndarray, " c"]
    """From the class's centre, its image nearest to the mean, to its farthest image."""
    next_centre: Float64[np.ndarray, " c"]
    """From the class's centre to that of the nearest other class."""
    mean_radius: float
    """Paper C's covering radius: the mean over classes of the radii of 1, 2, .. n_c centres."""
    inter_class: float
    """Mean distance of two images of different classes."""
    num_rows: int

    @property
    def num_overlapping(self) -> int:
        """Classes that reach as far as the centre of another one."""
        return int((self.radius >= self.next_centre).sum())


def reach_of_classes(vectors: Vectors, labels: Int64[np.ndarray, " n"]) -> Reach | None:
    """Radii and distances of whole classes with at most 2,048 images in all.

    The classes lie evenly among the labels, the same in every call. Costs 2048^2 * D operations and
    some megabytes, whatever n is. None where fewer than two classes have two images.
    """
    chosen = whole_classes(torch.from_numpy(labels), MOST_ROWS, _NO_LABEL).numpy()
    found, counts = np.unique(labels[chosen], return_counts=True)
    chosen = chosen[np.isin(labels[chosen], found[counts > 1])]
    kept = np.unique(labels[chosen])
    if len(kept) < 2:
        return None
    rows, own = vectors[chosen], labels[chosen]
    centres, radii = [], []
    for label in kept:
        members = rows[own == label].astype(np.float64)
        centre = members[np.square(members - members.mean(axis=0)).sum(axis=1).argmin()]
        centres.append(centre)
        radii.append(np.sqrt(np.square(members - centre).sum(axis=1).max()))
    points = torch.from_numpy(np.stack(centres))
    apart = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    apart.fill_diagonal_(torch.inf)
    sample, classes = torch.from_numpy(rows), torch.from_numpy(own)
    return Reach(
        kept,
        np.array(radii),
        apart.amin(dim=1).numpy(),
        float(covering_radius(sample, classes)),
        float(inter_class_distance(sample, classes)),
        len(rows),
    )


def reach_figure(reach: Reach, distance: str) -> Figure:
    """One dot a class: how far it reaches against how far the next class's centre is."""
    figure = new_figure(5.6, 4.1)
    axes = figure.add_subplot()
    overlaps = reach.radius >= reach.next_centre
    for rows, colour, marker, name in (
        (~overlaps, HIT_COLOUR, "o", "ends before the next centre"),
        (overlaps, MISS_COLOUR, "x", "reaches the next centre"),
    ):
        axes.scatter(
            reach.radius[rows], reach.next_centre[rows], s=16, color=colour, marker=marker,
            alpha=0.75, linewidths=1.0, label=f"{name} ({int(rows.sum())})",
        )  # fmt: skip
    top = 1.08 * max(reach.radius.max(), reach.next_centre.max(), 1e-12)
    axes.plot([0, top], [0, top], color="#888888", linewidth=1, linestyle="--")
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    dress(
        axes,
        "How far classes reach",
        f"radius: centre to farthest image ({distance})",
        "centre to the next class's centre",
    )
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure
