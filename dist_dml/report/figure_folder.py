"""Figures of a report: each is a file in the run's folder, and the same bytes in the page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dist_dml.report.page import Html, element, picture
from dist_dml.report.pictures import figure_bytes, png_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PIXELS_PER_CSS_PIXEL = 1.6  # Sharp on a telephone, and of a readable size on a large screen.
_BROAD = 650


class FigureFolder:
    """Writes figures beside the report.

    Attributes:
        written: names of the files, in the order of the page.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.written: list[str] = []

    def add(self, name: str, figure: Figure, alt: str, caption: str = "") -> Html:
        """Write `name`.png and return it for the page. `alt` says what it shows in words."""
        content = figure_bytes(figure)
        temporary = self._folder / f".{name}.png.tmp"
        temporary.write_bytes(content)
        temporary.replace(self._folder / f"{name}.png")
        self.written.append(f"{name}.png")
        return _shown(content, alt, caption)

    def existing(self, name: str, alt: str, caption: str = "") -> Html:
        """A picture that the evaluation has written, for the page."""
        return _shown((self._folder / f"{name}.png").read_bytes(), alt, caption)


def _shown(content: bytes, alt: str, caption: str) -> Html:
    width, height = (round(side / _PIXELS_PER_CSS_PIXEL) for side in png_size(content))
    if width > _BROAD:  # On a telephone it keeps a readable size and scrolls by itself.
        shown = picture(content, alt, width, height, "figure broad")
        shown = element("div", shown, class_="wide", tabindex="0")
    else:
        shown = picture(content, alt, width, height, "figure")
    return element("figure", shown, *([element("figcaption", caption)] if caption else []))
