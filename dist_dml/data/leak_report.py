"""The pairs that a search for leaks has found, side by side: a picture and a web page.

The figure is made with matplotlib's objects and never through `pyplot`, whose global list of
figures would choose a window system.
"""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dist_dml.data.image_comparison import KINDS
from dist_dml.data.index import Index
from dist_dml.data.leak_summary import KIND_NAMES, LeakSummary, summary_rows
from dist_dml.data.reader import open_reader, read_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_IN_PICTURE, _MOST_IN_PAGE = 24, 200
_COLUMNS = 3
_LETTERS = 30
_INK, _CONFLICT = "#222222", "#d7263d"


def contact_sheet(summary: LeakSummary) -> Figure:
    """The worst pairs side by side, 24 at most, with splits, classes and keys."""
    from matplotlib.figure import Figure

    pairs = summary.pairs
    shown = pairs.worst_first(_MOST_IN_PICTURE)
    rows = -(-len(shown) // _COLUMNS)
    cell_width, cell_height, top = 3.9, 2.55, 0.75
    width, height = cell_width * _COLUMNS + 0.2, cell_height * rows + top
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")

    def text(x: float, y: float, words: str, size: float, colour: str, weight: str) -> None:
        # A dollar sign in a name is no formula; matplotlib warns of letters its typeface lacks.
        words = words.encode("ascii", "replace").decode()
        figure.text(
            x / width,
            1 - y / height,
            words,
            fontsize=size,
            color=colour,
            weight=weight,
            va="top",
            parse_math=False,
            linespacing=1.15,
        )

    name = summary.index.folder.resolve().name
    found = f"{len(pairs):,} pair{'' if len(pairs) == 1 else 's'}"
    title = f"Leaks in {name}: {found}, {len(shown)} shown, worst first"
    text(0.2, 0.14, title, 14, _INK, "bold")
    text(0.2, 0.44, " | ".join(_headlines(summary)), 8.5, _INK, "normal")
    reader = open_reader(summary.index, 3)
    for place, entry in enumerate(shown.tolist()):
        left = 0.2 + cell_width * (place % _COLUMNS)
        upper = top + cell_height * (place // _COLUMNS)
        colour = _CONFLICT if pairs.conflict[entry] else _INK
        text(left, upper, pair_title(summary, entry), 8.5, colour, "bold")
        for side, ids in enumerate((pairs.id_a, pairs.id_b)):
            sample_id = int(ids[entry])
            x = left + 1.8 * side
            box = (x / width, 1 - (upper + 1.85) / height, 1.65 / width, 1.65 / height)
            axes = figure.add_axes(box, xticks=[], yticks=[], anchor="NW")
            image = smaller(read_image(summary.index, reader, sample_id), 256)
            axes.imshow(image, interpolation="antialiased")
            axes.spines[:].set(edgecolor=colour, linewidth=1.0)
            below = upper + 0.25 + 1.65 * min(1.0, image.shape[0] / image.shape[1])
            text(x, below, _caption(summary.index, sample_id), 6.8, colour, "normal")
    return figure


def _headlines(summary: LeakSummary) -> list[str]:
    lines = [
        f"{part.split_a} - {part.split_b}: {part.affected:,} of {part.total:,} images of "
        f"{part.split_b} affected ({part.share:.2%})"
        for part in summary.splits
    ]
    disputed = sum(sum(part.kinds) for part in summary.conflicts)
    return [*lines, f"label conflicts within a split: {disputed:,}"]


def pair_title(summary: LeakSummary, entry: int) -> str:
    """What a pair is, in a few words."""
    pairs = summary.pairs
    kind = KINDS[pairs.kind[entry]]
    words = KIND_NAMES[kind]
    if kind == "near":
        words += f", correlation {pairs.correlation[entry]:.3f}"
    return f"Label conflict: {words}" if pairs.conflict[entry] else words[0].upper() + words[1:]


def _caption(index: Index, sample_id: int) -> str:
    """Split, class and key; two lines at most for each name."""
    split = index.split_names[index.split[sample_id]]
    name = f"class {index.class_names[index.class_id[sample_id]]}"
    lines = textwrap.wrap(name, _LETTERS, max_lines=2, placeholder="..") or ["class"]
    # Keys have no spaces to break at.
    key = f"key {index.key(sample_id)}"
    key = key if len(key) <= 2 * _LETTERS else f"{key[: 2 * _LETTERS - 2]}.."
    pieces = [key[start : start + _LETTERS] for start in range(0, len(key), _LETTERS)]
    return "\n".join([f"split {split}", *lines, *pieces])


def smaller(image: np.ndarray, side: int) -> np.ndarray:
    """The image with a longer side of at most `side` pixels; its own proportions."""
    import cv2

    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    size = tuple(max(1, round(length * scale)) for length in (image.shape[1], image.shape[0]))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def web_page(summary: LeakSummary) -> str:
    """One HTML file that needs no other: the table and the 200 worst pairs with their images."""
    index, pairs = summary.index, summary.pairs
    reader = open_reader(index, 3)

    def cell(sample_id: int) -> str:
        picture = _data_url(smaller(read_image(index, reader, sample_id), 200))
        caption = html.escape(_caption(index, sample_id)).replace("\n", "<br>")
        return f'<td><img src="{picture}" alt=""><br>{caption}</td>'

    shown = pairs.worst_first(_MOST_IN_PAGE)
    rows = [
        f"<tr><td>{html.escape(pair_title(summary, entry))}</td>"
        f"{cell(int(pairs.id_a[entry]))}{cell(int(pairs.id_b[entry]))}</tr>"
        for entry in shown.tolist()
    ]
    name = html.escape(index.folder.resolve().name)
    return (
        f'<!doctype html><meta charset="utf-8"><title>Leaks in {name}</title>'
        "<style>body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:6px;text-align:left;vertical-align:top}"
        "img{max-width:200px;min-width:64px;image-rendering:auto}</style>"
        f"<h1>Leaks in {name}</h1>{_html_table(summary_rows(summary))}"
        "<p>Within a split only pairs of different classes count: label conflicts.</p>"
        f"<h2>{len(shown):,} of {len(pairs):,} pairs, the worst first</h2>"
        f"<table>{''.join(rows)}</table>"
    )


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(rows, ["th"] + ["td"] * (len(rows) - 1), strict=True)
    ]
    return f"<table>{''.join(lines)}</table>"


def _data_url(image: np.ndarray) -> str:
    import simplejpeg

    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(image), 90, "RGB")
    return f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"
