"""A map of the embeddings: images that are near each other stay so, as far as a plane allows.

t-SNE (van der Maaten and Hinton 2008) by scikit-learn: seeded, and of few images. Distances between
far groups, their sizes and the axes mean nothing; that two classes mix does.

Dimensions: `m` images shown, `D` features.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32, Int64

from dist_dml.keyed_random import generator, key_of
from dist_dml.report.pictures import GREY, new_figure
from dist_dml.retrieval.report import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 1500
MOST_COLOURED = 12
MOST_OF_A_CLASS = 60
FEWEST_POINTS = 8
_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9",
    "#7b3fa0", "#8c6d31", "#d7263d", "#2f7f7f", "#111111", "#a6a600",
)  # fmt: skip
_MARKERS = "osD^vP*Xp<>h"


@dataclass(frozen=True)
class MapPoints:
    """Which images the map shows."""

    rows: Int64[np.ndarray, " m"]
    """Of the embeddings, ascending."""
    coloured: tuple[int, ...]
    """Labels of the classes that have colours, the largest first."""


def choose_points(labels: Int64[np.ndarray, " n"], seed: int, most: int = MOST_POINTS) -> MapPoints:
    """All images, or `most` of them: some of each of the largest classes, the others at random.

    A draw of all images alike would have hardly two of a class where classes are many. At most 60
    images of each of the 12 largest classes (of equal sizes the lower label) come first.
    """
    classes, counts = np.unique(labels, return_counts=True)
    coloured = classes[np.lexsort((classes, -counts))][:MOST_COLOURED]
    if len(labels) <= most:
        return MapPoints(np.arange(len(labels)), tuple(coloured.tolist()))
    order = generator(key_of(seed, "embedding map")).permutation(len(labels))
    each = min(MOST_OF_A_CLASS, most // (2 * len(coloured)))
    first = [order[labels[order] == label][:each] for label in coloured]
    taken = np.concatenate(first)
    others = order[~np.isin(order, taken)][: most - len(taken)]
    return MapPoints(np.sort(np.concatenate([taken, others])), tuple(coloured.tolist()))


def plane(vectors: Float32[np.ndarray, "m D"], seed: int) -> Float32[np.ndarray, "m 2"]:
    """The places of the images by t-SNE: perplexity 30, or a third of the images if they are few.

    The same for the same seed and machine. Costs about 5 s at 1,500 images on one core.

    Raises:
        ValueError: for fewer than 8 images, or if all are the same; says so in words.
    """
    if len(vectors) < FEWEST_POINTS:
        raise ValueError(f"a map of {len(vectors)} images says nothing; it begins at 8")
    if np.ptp(vectors, axis=0).max() == 0:
        raise ValueError("all embeddings are the same point: there is nothing to spread out")
    from sklearn.manifold import TSNE

    method = TSNE(
        n_components=2,
        perplexity=min(30.0, (len(vectors) - 1) / 3),
        # From the principal plane, where there is one: the large picture is then the data's own.
        init="pca" if vectors.shape[1] > 1 else "random",
        learning_rate="auto",
        max_iter=750,
        random_state=seed % 2**32,
        n_jobs=1,
    )
    return method.fit_transform(vectors)


def map_figure(
    places: Float32[np.ndarray, "m 2"],
    labels: Int64[np.ndarray, " m"],
    coloured: tuple[int, ...],
    names: Mapping[int, str],
) -> Figure:
    """Dots in the plane: the largest classes by colour and shape, all others small and grey."""
    figure = new_figure(8.4, 5.6)
    axes = figure.add_subplot()
    rest = ~np.isin(labels, coloured)
    axes.scatter(*places[rest].T, s=5, color="#9aa0a8", alpha=0.5, linewidths=0)
    for label, colour, marker in zip(coloured, _COLOURS, _MARKERS, strict=False):
        rows = labels == label
        axes.scatter(
            *places[rows].T, s=24, color=colour, marker=marker, linewidths=0.3, edgecolors="white",
            label=f"{_short(names.get(label, str(label)))} ({int(rows.sum())})",
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#c8ccd2")
    axes.set_aspect("equal", adjustable="datalim")
    legend = axes.legend(
        title=f"largest classes (images), {int(rest.sum())} others grey",
        frameon=False, fontsize=7.5, title_fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5),
        labelcolor=INK,
    )  # fmt: skip
    legend.get_title().set_color(GREY)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _short(name: str) -> str:
    """One line of ASCII: matplotlib warns of each character its typeface lacks."""
    plain = " ".join(name.encode("ascii", "replace").decode().split())
    # A leading underscore would keep the class out of matplotlib's legend.
    return textwrap.shorten(plain.lstrip("_") or plain.replace("_", "-"), 30, placeholder="..")
