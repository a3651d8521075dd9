"""Figures and samples as small files of bytes: PNG with few colours, JPEG thumbnails.

Figures are matplotlib objects and never `pyplot`, whose global list would keep each alive.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import cv2
import numpy as np
from jaxtyping import UInt8

from dist_dml.retrieval.report import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#5a5a5a"
THUMBNAIL_PIXELS = 112
"""The longer side of a thumbnail; samples that are smaller stay as they are."""
_JPEG_QUALITY = 80
_MOST_COLOURS = 192
_DPI = 144


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of a size in inches, whose parts arrange themselves."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white")


def dress(axes: Axes, title: str, x: str, y: str) -> None:
    """The house's looks. No text is read as a formula."""
    axes.set_title(title, loc="left", fontsize=10, color=INK, weight="bold", parse_math=False)
    axes.set_xlabel(x, fontsize=8.5, color=GREY)
    axes.set_ylabel(y, fontsize=8.5, color=GREY)
    axes.tick_params(labelsize=8, colors=GREY)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")


def figure_bytes(figure: Figure) -> bytes:
    """The figure as a PNG of at most 192 colours: a third of the bytes, and no eye sees it."""
    from PIL import Image

    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=_DPI)
    raw.seek(0)
    small = io.BytesIO()
    with Image.open(raw) as image:
        reduced = image.convert("RGB").quantize(_MOST_COLOURS, dither=Image.Dither.NONE)
        reduced.save(small, format="png", optimize=True)
    return small.getvalue()


def png_size(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG's header, in pixels."""
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def thumbnail(image: UInt8[np.ndarray, "H W *C"]) -> tuple[bytes, int, int]:
    """A sample in small: bytes, width and height in pixels; about 1 to 4 kB.

    PNG up to 32 x 32 pixels, where JPEG's blocks would show and save nothing; JPEG above.

    Args:
        image: uint8, (H, W), (H, W, 1) or RGB (H, W, 3).
    """
    height, width = image.shape[:2]
    scale = THUMBNAIL_PIXELS / max(height, width)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in (width, height))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if image.ndim == 3 and image.shape[2] == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    small = max(width, height) <= 32
    options = [] if small else [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    _, content = cv2.imencode(".png" if small else ".jpg", image, options)
    return content.tobytes(), width, height
