"""`dist-dml pack glyphs`: a real data set of many classes, drawn from installed typefaces.

A class is a character, a sample one typeface's drawing of it, turned, scaled, shifted, blurred and
made noisy by draws that depend on seed, code point and typeface alone. Needs no download.
`VERSION` and the ranges below define the data set: change the one with the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dist_dml.data.index import Index
from dist_dml.data.index_command import describe
from dist_dml.data.pack.glyph_classes import GlyphClass, draw_clean, find_classes, open_face
from dist_dml.data.pack.writing import plan_shards, write_pack
from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of

VERSION = 1
SIDE = 64
"""Height and width of an image in pixels."""
_EM = 40
"""Pixels per em at scale 1."""
_LARGEST = 52
"""Most pixels of ink, across or down, at scale 1; larger drawings are made to fit."""
_ROTATION_DEGREES = 15.0
_SCALE = (0.75, 1.15)
_SHIFT_PIXELS = 4.0
_BLUR_SIGMA = (0.0, 1.0)
_CONTRAST = (0.5, 1.0)
_NOISE_SIGMA = (0.0, 12.0)
_SEEN_PER_CLASS = 2
_MIN_FACES = 8
_PNG_COMPRESSION = 3
_BYTES_PER_IMAGE = 4600

_FACES = tuple(
    family + style
    for family, styles in {
        "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
        "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    }.items()
    for style in styles
)
"""matplotlib's text faces. Its others have their own encodings or one glyph for everything."""


@dataclass(frozen=True)
class GlyphSample:
    """One drawing: its WebDataset key, the name of its class, its code point and typeface."""

    key: str
    label: str
    codepoint: int
    font_path: str


def default_fonts() -> tuple[str, ...]:
    """Font files of the 16 text faces that matplotlib brings along."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(str(folder / f"{name}.ttf") for name in _FACES)


def pack_glyphs(
    out: str | Path,
    fonts: Sequence[str | Path] = (),
    seed: int = 0,
    min_faces: int = _MIN_FACES,
    shard_samples: int = 2048,
    processes: int = 0,
) -> Index:
    """Draw and pack the characters of some typefaces as 64 x 64 grey PNG images.

    Half of the classes, drawn by `seed`, are `test` (unseen). Two images of each other class are
    `seen`, the rest `train`. Which characters are a class: see `glyph_classes`.

    Args:
        out: data set folder.
        fonts: font files; by default matplotlib's 16 text faces.
        seed: of the division, the order and the transforms.
        min_faces: typefaces that must draw a class.
        shard_samples: images of a tar.
        processes: drawing processes; 0 takes one per core.

    Raises:
        UsageError: a font cannot be read, the fonts share no characters, or `out` is in use.
    """
    import cv2
    import matplotlib

    paths = _checked_fonts([str(font) for font in fonts] or list(default_fonts()))
    classes = find_classes(paths, min_faces)
    if len(classes) < 2:
        raise UsageError(
            f"--fonts: {len(paths)} typefaces have {len(classes)} characters that {min_faces} of "
            "them draw, expected 2 or more; add typefaces or lower --min-faces"
        )
    splits = _divide(classes, paths, seed)
    source = {
        "kind": "glyphs",
        "version": VERSION,
        "seed": seed,
        "min_faces": min_faces,
        "shard_samples": shard_samples,
        "fonts": {Path(p).stem: hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths},
    }
    made_with = {
        "matplotlib": matplotlib.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "unicode": unicodedata.unidata_version,
    }
    shards = [
        shard
        for split, samples in splits.items()
        for shard in plan_shards(split, samples, shard_samples)
    ]
    size = _BYTES_PER_IMAGE * sum(len(samples) for samples in splits.values())
    render = partial(_render, seed)
    return write_pack(Path(out), shards, render, source, made_with, size, processes)


def _checked_fonts(paths: list[str]) -> list[str]:
    stems: set[str] = set()
    for path in paths:
        try:
            open_face(path)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"--fonts {path}: no readable font file ({reason})") from None
        if Path(path).stem in stems:
            raise UsageError(f"--fonts {path}: two files of this name; rename one")
        stems.add(Path(path).stem)
    return paths


def _divide(
    classes: Sequence[GlyphClass], paths: Sequence[str], seed: int
) -> dict[str, list[GlyphSample]]:
    """Half of the classes to `test`; of the others two drawings each to `seen`. Shuffled."""
    order = generator(key_of(seed, "glyph classes")).permutation(len(classes))
    training = set(order[: math.ceil(len(classes) / 2)].tolist())
    splits: dict[str, list[GlyphSample]] = {"train": [], "seen": [], "test": []}
    for number, glyph_class in enumerate(classes):
        random = generator(key_of(seed, "glyph seen", glyph_class.codepoints[0]))
        count = min(_SEEN_PER_CLASS, len(glyph_class.drawings) // 4)
        seen = set(random.permutation(len(glyph_class.drawings))[:count].tolist())
        for place, (face, codepoint) in enumerate(glyph_class.drawings):
            split = "test" if number not in training else "seen" if place in seen else "train"
            key = f"U+{codepoint:04X}-{Path(paths[face]).stem.replace('.', '_')}"
            splits[split].append(GlyphSample(key, glyph_class.name, codepoint, paths[face]))
    for name, samples in splits.items():
        shuffled = generator(key_of(seed, "glyph order " + name)).permutation(len(samples))
        splits[name] = [samples[i] for i in shuffled]
    return splits


def draw_sample(font_path: str, codepoint: int, seed: int) -> UInt8[np.ndarray, "64 64"]:
    """One image of the data set: dark ink on light paper, transformed by its own draws."""
    import cv2

    face_number = zlib.crc32(Path(font_path).stem.encode())
    random = generator(key_of(seed, "glyph", codepoint, face_number))
    draws = random.random(8).tolist()

    def between(bounds: tuple[float, float], number: int) -> float:
        return bounds[0] + (bounds[1] - bounds[0]) * draws[number]

    scale = between(_SCALE, 0)
    angle = math.radians(between((-_ROTATION_DEGREES, _ROTATION_DEGREES), 1))
    shift = [between((-_SHIFT_PIXELS, _SHIFT_PIXELS), number) for number in (2, 3)]
    face = open_face(font_path)
    ink = draw_clean(face, codepoint, _EM * scale)
    if ink is not None and max(ink.shape) > _LARGEST * scale:
        ink = draw_clean(face, codepoint, _EM * scale * _LARGEST * scale / max(ink.shape))
    if ink is None:
        raise UsageError(
            f"--fonts: {Path(font_path).name} draws U+{codepoint:04X} without ink at "
            f"{_EM * scale:.1f} pixels per em; leave this font out"
        )

    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    centre = np.array([ink.shape[1] - 1, ink.shape[0] - 1]) / 2
    middle = (SIDE - 1) / 2 + np.array(shift)
    matrix = np.column_stack([turn, middle - turn @ centre])
    picture = cv2.warpAffine(ink, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR).astype(np.float32)
    sigma = between(_BLUR_SIGMA, 4)
    if sigma > 0.1:
        picture = cv2.GaussianBlur(picture, (7, 7), sigma)
    picture = 127.5 + between(_CONTRAST, 5) * (127.5 - picture)
    noise = random.standard_normal((SIDE, SIDE), dtype=np.float32)
    picture += np.float32(between(_NOISE_SIGMA, 6)) * noise
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _render(seed: int, sample: GlyphSample) -> dict[str, str | bytes]:
    import cv2

    # Rendering runs in as many processes as cores: threads inside would only get in their way.
    cv2.setNumThreads(0)
    picture = draw_sample(sample.font_path, sample.codepoint, seed)
    options = [cv2.IMWRITE_PNG_COMPRESSION, _PNG_COMPRESSION]
    described = {
        "label": sample.label,
        "codepoint": sample.codepoint,
        "character": chr(sample.codepoint),
        "face": Path(sample.font_path).stem,
    }
    return {
        "__key__": sample.key,
        "png": cv2.imencode(".png", picture, options)[1].tobytes(),
        "cls": sample.label.encode(),
        "json": json.dumps(described).encode(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack glyphs`."""
    parser.add_argument("out", help="folder of the new data set")
    parser.add_argument("--fonts", nargs="+", default=[], help="font files (default: matplotlib's)")
    parser.add_argument("--seed", type=int, default=0, help="of division, order and transforms")
    parser.add_argument("--min-faces", type=int, default=_MIN_FACES, help="typefaces of a class")
    parser.add_argument("--shard-samples", type=int, default=2048, help="images of a shard")
    parser.add_argument("--processes", type=int, default=0, help="drawing processes; 0: all cores")


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack glyphs`. Returns the exit code."""
    index = pack_glyphs(
        arguments.out,
        arguments.fonts,
        arguments.seed,
        arguments.min_faces,
        arguments.shard_samples,
        arguments.processes,
    )
    print(describe(index))
    return 0
