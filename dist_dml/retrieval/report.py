"""What a person looks at after an evaluation: hits and misses, a curve, a table of scores.

Figures are made with matplotlib's objects and never through `pyplot`, whose global list of figures
would choose a window system and keep every figure alive.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.neighbours import NO_NEIGHBOUR
from dist_dml.retrieval.protocol import relevant_counts
from dist_dml.retrieval.ranking import nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HIT_COLOUR = "#1a9850"
MISS_COLOUR = "#d7263d"
INK = "#222222"
LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
MARKERS = "osD^vP*"
MOST_CANDIDATES = 20_000
"""Queries among which the hardest misses are looked for."""
COLUMN_NAMES = {
    "r_precision": "R-precision",
    "map_at_r": "MAP@R",
    "f1_at_1": "F1@1",
    "mean_reciprocal_rank": "MRR",
    "nmi": "NMI",
    "ami": "AMI",
    "tar_at_far_0.001": "TAR@FAR=1e-3",
    "equal_error_rate": "EER",
    # How alike a top-k variant ranks to the full metric.
    "rank_overlap_at_10": "overlap@10",
    "rank_spearman_at_100": "Spearman@100",
}


@dataclass(frozen=True)
class GalleryRows:
    """The queries that a retrieval gallery shows, and what was found for them."""

    queries: np.ndarray
    """Rows of the queries (m,): first the hardest misses, then random ones."""
    num_hardest: int
    neighbours: np.ndarray
    """Rows of the gallery (m, k), nearest first; -1 where there is none."""
    hits: np.ndarray
    """Whether each neighbour has the query's class (m, k)."""
    values: np.ndarray
    """What the distance says of each (m, k), as `ranking.nearest` gives it."""


def choose_rows(
    queries: Embeddings,
    gallery: Embeddings | None,
    distance: Distance,
    num_rows: int,
    num_neighbours: int,
    seed: int,
) -> GalleryRows:
    """Half of the rows the hardest misses, the others drawn at random; no query twice.

    A miss is a query whose nearest neighbour is of another class although the gallery has its own.
    The hardest have the fewest hits among the neighbours shown, and of these the nearest wrong
    neighbour: the most confident mistakes. Where there are fewer misses, random rows fill up.
    Looks at no more than 20,000 queries (drawn at random) and costs their search.
    """
    draw = generator(key_of(seed, "retrieval gallery"))
    candidates = draw.permutation(len(queries))[:MOST_CANDIDATES]
    searched = queries if gallery is None else gallery
    counts = relevant_counts(queries, searched)
    candidates = candidates[counts[candidates] > 0]
    part = queries.rows(candidates)
    indices, distances = nearest(part, searched, num_neighbours, distance)
    hits = (indices != NO_NEIGHBOUR) & (searched.labels[indices] == part.labels[:, None])
    nearness = -distances[:, 0] if distance.larger_is_nearer else distances[:, 0]
    order = np.lexsort((nearness, hits.sum(axis=1)))
    hardest = order[~hits[order, 0]][: num_rows // 2]
    others = np.setdiff1d(np.arange(len(candidates)), hardest)  # sorted, hence in drawn order
    chosen = np.concatenate([hardest, others[: num_rows - len(hardest)]])
    return GalleryRows(
        candidates[chosen], len(hardest), indices[chosen], hits[chosen], distances[chosen]
    )


def retrieval_gallery(
    queries: Embeddings,
    gallery: Embeddings | None,
    distance: Distance,
    load_image: Callable[[int], np.ndarray],
    class_names: Mapping[int, str] | None = None,
    num_rows: int = 12,
    num_neighbours: int = 8,
    seed: int = 0,
    title: str = "Retrieval",
    rows: GalleryRows | None = None,
) -> Figure:
    """Queries and their nearest images: thick green frames are hits, thin red ones misses.

    Args:
        queries: what is searched for.
        gallery: what is searched; None searches the queries themselves, each without itself.
        distance: what to rank by.
        load_image: from a sample's id to its image, uint8, (H, W), (H, W, 1) or (H, W, 3).
        class_names: captions by label; None writes the label.
        num_rows: queries shown (see `choose_rows`).
        num_neighbours: images beside each query.
        seed: of the random rows.
        title: headline.
        rows: of `choose_rows` with these numbers, where they are known; they cost a search.

    Raises:
        UsageError: if no query has an image of its class in the gallery.
    """
    from matplotlib.figure import Figure

    if rows is None:
        rows = choose_rows(queries, gallery, distance, num_rows, num_neighbours, seed)
    if len(rows.queries) == 0:
        raise UsageError("no query has an image of its class in the gallery: nothing to show")
    searched = queries if gallery is None else gallery
    num_groups = (rows.num_hardest > 0) + (len(rows.queries) > rows.num_hardest)
    width = 0.92 * (num_neighbours + 1.35) + 0.3
    height = 1.14 * len(rows.queries) + 0.42 * num_groups + 0.62
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    # One drawing surface in inches: an axes for each image would take seconds of every run.
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _text(axes, 0.15, height - 0.2, title, 13, weight="bold")
    _text(
        axes,
        0.15,
        height - 0.44,
        f"Left: the query; then its {num_neighbours} nearest by {distance.name}. "
        "Thick green: same class. Thin red: another class.",
        8,
    )
    top = height - 0.62
    for i, query in enumerate(rows.queries):
        if i in (0, rows.num_hardest):
            heading = "Hardest misses" if i < rows.num_hardest else "Random queries"
            _text(axes, 0.15, top - 0.2, heading, 10, weight="bold")
            top -= 0.42
        cells: list[tuple[Embeddings, int, bool | None]] = [(queries, int(query), None)]
        for j in range(num_neighbours):
            if rows.neighbours[i, j] != NO_NEIGHBOUR:
                cells.append((searched, int(rows.neighbours[i, j]), bool(rows.hits[i, j])))
        for column, (samples, row, hit) in enumerate(cells):
            left = 0.15 + 0.92 * column + (0.32 if column else 0.0)
            caption = _caption(int(samples.labels[row]), class_names or {})
            image = load_image(int(samples.ids[row]))
            _cell(axes, left, top - 0.78, image, caption, hit)
        top -= 1.14
    # After the images, each of which would set the limits to its own.
    axes.set(xlim=(0, width), ylim=(0, height))
    return figure


def _text(axes: Axes, x: float, y: float, text: str, size: int, weight: str = "normal") -> None:
    # A dollar sign in a name is no formula.
    axes.text(x, y, text, fontsize=size, weight=weight, va="center", color=INK, parse_math=False)


def _cell(
    axes: Axes, left: float, bottom: float, image: np.ndarray, caption: str, hit: bool | None
) -> None:
    """Draws one image in a square of 0.8 inches, with its frame; `hit` is None for the query."""
    from matplotlib.patches import Rectangle

    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    high, wide = (0.8 * side / max(image.shape[:2]) for side in image.shape[:2])
    left, bottom = left + (0.8 - wide) / 2, bottom + (0.8 - high) / 2
    extent = (left, left + wide, bottom, bottom + high)
    axes.imshow(
        image,
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="antialiased",
        extent=extent,
        aspect="auto",
    )
    colour = INK if hit is None else HIT_COLOUR if hit else MISS_COLOUR
    # Not by colour alone: many eyes do not tell red from green.
    frame = Rectangle(
        (left, bottom), wide, high, fill=False, edgecolor=colour, linewidth=3.0 if hit else 1.2
    )
    axes.add_patch(frame)
    axes.text(
        left + wide / 2,
        bottom - 0.05,
        caption,
        fontsize=5.5,
        color=colour,
        ha="center",
        va="top",
        parse_math=False,
    )


def _caption(label: int, class_names: Mapping[int, str]) -> str:
    """At most two lines of ASCII: matplotlib warns of each character its typeface lacks."""
    name = class_names.get(label, str(label)).encode("ascii", "replace").decode()
    return "\n".join(textwrap.wrap(name, width=15, max_lines=2, placeholder=".."))


def recall_curve(rows: Mapping[str, Mapping[int, float]], title: str = "Recall@K") -> Figure:
    """Recall@K over K, one line for each row, such as pixels, untrained and trained.

    Args:
        rows: name -> {K: Recall@K in 0..1}.
        title: headline.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), dpi=110, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    cutoffs = sorted({k for recalls in rows.values() for k in recalls})
    for i, (name, recalls) in enumerate(rows.items()):
        ks = sorted(recalls)
        axes.plot(
            ks,
            [recalls[k] for k in ks],
            marker=MARKERS[i % len(MARKERS)],
            color=LINE_COLOURS[i % len(LINE_COLOURS)],
            linewidth=2,
            # Numbers at the points would cover each other where lines are close.
            label=f"{name} (Recall@{ks[0]} = {recalls[ks[0]]:.3f})",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(cutoffs, [str(k) for k in cutoffs])
    axes.minorticks_off()
    axes.set_ylim(0, 1.04)
    axes.margins(x=0.08)
    axes.set_xlabel("K: nearest images looked at")
    axes.set_ylabel("Recall@K")
    axes.set_title(title, loc="left", weight="bold", parse_math=False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, loc="best").get_texts():
        text.set_parse_math(False)
    return figure


def score_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """An aligned plain-text table: one line a row, one column for each score that any row has.

    Args:
        rows: name -> scores as named by `summarise` (and `nmi`), without the distance's prefix.
            `precision_at_1` (equal to Recall@1) and counts are left out; a missing score is a `-`.
    """
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    recalls = sorted(
        (name for name in names if name.startswith("recall_at_")),
        key=lambda name: int(name.removeprefix("recall_at_")),
    )
    columns = recalls + [name for name in COLUMN_NAMES if name in names]
    headings = [COLUMN_NAMES.get(name, name.replace("recall_at_", "Recall@")) for name in columns]
    lines: list[Sequence[str]] = [["", *headings]]
    for row, scores in rows.items():
        cells = [f"{scores[name]:.4f}" if name in scores else "-" for name in columns]
        lines.append([row, *cells])
    return aligned_table(lines)


def aligned_table(lines: Sequence[Sequence[str]]) -> str:
    """Plain text: the first column to the left, the others to the right, a rule below the heads.

    Args:
        lines: heads first; as many cells in each.
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    texts.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(texts)
