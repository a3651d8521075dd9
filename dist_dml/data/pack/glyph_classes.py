"""Which characters are a class: compares the clean drawings of every code point in every typeface.

The rules, applied in this order:
1. Control, format, private, unassigned and space characters are left out, and so are box drawing,
   block elements and braille: they repeat one bitmap over all typefaces.
2. A drawing counts if it has ink. The notdef glyph does not.
3. Code points whose cropped drawings are the same bitmap in at least half of the typefaces that
   have both, and in two of them or more, are one class (Latin A, Greek Alpha, Cyrillic A). In a
   typeface that draws several of them the lowest code point is kept.
4. A drawing that is also the drawing of another class in the same typeface is left out of both.
5. A class needs drawings in `min_faces` typefaces, half of them different bitmaps at the least:
   arrows and squares that all typefaces of a family share would flatter a retrieval score.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import UInt8

_COMPARED_EM = 32.0
"""Pixels per em of the drawings that are compared."""
_FAINTEST_INK = 64
_EXCLUDED_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"})
_EXCLUDED_BLOCKS = ((0x2500, 0x259F), (0x2800, 0x28FF))
"""Box drawing and block elements; braille patterns."""

Drawings = dict[int, dict[int, bytes]]
"""code point -> typeface number -> cropped drawing with its shape, as bytes."""


@dataclass(frozen=True)
class GlyphClass:
    """One class: its code points and its drawings, each a (typeface number, code point)."""

    codepoints: tuple[int, ...]
    drawings: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """The first code point with its character's name, then the code points that look alike."""
        first, *others = self.codepoints
        name = f"U+{first:04X} {unicodedata.name(chr(first), 'UNNAMED')}"
        return " = ".join([name, *(f"U+{code:04X}" for code in others)])


@lru_cache(maxsize=64)
def open_face(path: str) -> Any:
    """The typeface of a font file, a matplotlib `FT2Font`; kept open in each process."""
    from matplotlib.ft2font import FT2Font

    return FT2Font(path)


def draw_clean(face: Any, codepoint: int, em: float) -> UInt8[np.ndarray, "h w"] | None:
    """The ink (0..255) of one character, cropped to it; None where there is none.

    Drawn without hinting, which would move outlines onto the pixel grid.

    Args:
        face: typeface.
        codepoint: a character of its character map.
        em: size in pixels.
    """
    from matplotlib.ft2font import LoadFlags

    face.set_size(em, 72)
    glyph = face.load_char(codepoint, flags=LoadFlags.NO_HINTING)
    left, bottom, right, top = glyph.bbox  # In 1/64 pixel.
    height, width = (top - bottom) // 64 + 5, (right - left) // 64 + 5
    canvas = np.zeros((max(height, 1), max(width, 1)), np.uint8)
    # matplotlib adds the left bearing to x, but no bearing to y, and cuts off what lies outside.
    face.draw_glyph_to_bitmap(canvas, 1 - left // 64, 1, glyph)
    rows, columns = np.flatnonzero(canvas.any(axis=1)), np.flatnonzero(canvas.any(axis=0))
    if not len(rows):
        return None
    return canvas[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def find_classes(font_paths: Sequence[str], min_faces: int) -> list[GlyphClass]:
    """The classes that the typefaces offer, by ascending first code point.

    Costs about 40 us a drawing: 2 s for matplotlib's 16 text faces.
    """
    drawings = _draw_all(font_paths)
    groups = _merge(drawings)
    chosen = [_one_per_face(drawings, codepoints) for codepoints in groups]
    owners: dict[tuple[int, bytes], set[int]] = defaultdict(set)
    for number, faces in enumerate(chosen):
        for face, code in faces.items():
            owners[face, drawings[code][face]].add(number)
    classes = []
    for codepoints, faces in zip(groups, chosen, strict=True):
        own = {
            face: code
            for face, code in sorted(faces.items())
            if len(owners[face, drawings[code][face]]) == 1
        }
        different = len({drawings[code][face] for face, code in own.items()})
        if len(own) >= min_faces and 2 * different >= min_faces:
            classes.append(GlyphClass(tuple(codepoints), tuple(own.items())))
    return classes


def _accepted(codepoint: int) -> bool:
    if any(first <= codepoint <= last for first, last in _EXCLUDED_BLOCKS):
        return False
    return unicodedata.category(chr(codepoint)) not in _EXCLUDED_CATEGORIES


def _draw_all(font_paths: Sequence[str]) -> Drawings:
    drawings: Drawings = defaultdict(dict)
    for number, path in enumerate(font_paths):
        face = open_face(path)
        for codepoint, glyph in sorted(face.get_charmap().items()):
            if not glyph or not _accepted(codepoint):
                continue
            ink = draw_clean(face, codepoint, _COMPARED_EM)
            if ink is not None and ink.max() >= _FAINTEST_INK:
                drawings[codepoint][number] = repr(ink.shape).encode() + ink.tobytes()
    return drawings


def _merge(drawings: Drawings) -> list[list[int]]:
    """Groups of code points that look alike (rule 3), each ascending, by their first."""
    same: Counter[tuple[int, int]] = Counter()
    by_bitmap: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for codepoint in sorted(drawings):
        for face, bitmap in drawings[codepoint].items():
            by_bitmap[face, bitmap].append(codepoint)
    for codepoints in by_bitmap.values():
        same.update(combinations(codepoints, 2))
    alike = [
        (a, b)
        for (a, b), count in same.items()
        if count >= 2 and 2 * count >= len(drawings[a].keys() & drawings[b].keys())
    ]
    return _components(sorted(drawings), alike)


def _components(items: Iterable[int], pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Connected components of a graph, by union-find; the smallest item is the root."""
    parent = {item: item for item in items}

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    groups: dict[int, list[int]] = defaultdict(list)
    for item in parent:
        groups[root(item)].append(item)
    return [groups[first] for first in sorted(groups)]


def _one_per_face(
    drawings: Mapping[int, Mapping[int, bytes]], codepoints: Sequence[int]
) -> dict[int, int]:
    """For each typeface the lowest code point of the class that it draws."""
    chosen: dict[int, int] = {}
    for codepoint in codepoints:
        for face in drawings[codepoint]:
            chosen.setdefault(face, codepoint)
    return chosen
