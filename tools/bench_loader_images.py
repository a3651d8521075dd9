"""What `bench_loader` reads: seeded synthetic photographs, as shards and as a tree of files.

The same JPEG bytes lie in both, so that every reader decodes the same images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from dist_dml.data.index import Index
from dist_dml.data.index_command import build_index
from dist_dml.data.shards import write_shard
from dist_dml.keyed_random import generator, key_of

NUM_CLASSES = 20
QUALITY = 90
# At least as many shards as any reader has processes: WebDataset gives each process whole shards.
_NUM_SHARDS = 8


@dataclass(frozen=True, eq=False)
class Images:
    """One set of images in both forms."""

    index: Index
    shards: tuple[str, ...]
    tree: Path
    count: int
    side: int
    bytes_each: int


def photograph(key: int, side: int) -> np.ndarray:
    """RGB pixels: noise whose amplitude falls with its wavelength, edged shapes, fine grain.

    At quality 90 a 256 x 256 one takes about 20 KB, as photographs do.
    """
    random = generator(key)
    image = np.empty((side, side, 3), np.float32)
    image[:] = random.uniform(70, 180, 3)
    length, level = side / 2, 40.0
    while length >= 4:
        cells = math.ceil(side / length) + 1
        waves = random.standard_normal((cells, cells, 3), dtype=np.float32) * level
        image += cv2.resize(waves, (side, side), interpolation=cv2.INTER_CUBIC)
        length, level = length / 2, level * 0.62
    for _ in range(6):
        centre = random.integers(0, side, 2).tolist()
        axes = random.integers(side // 20 + 1, side // 4 + 2, 2).tolist()
        colour = random.uniform(0, 255, 3).tolist()
        angle = float(random.uniform(0, 180))
        cv2.ellipse(image, centre, axes, angle, 0, 360, colour, -1, cv2.LINE_AA)
    image += random.standard_normal(image.shape, dtype=np.float32) * 5
    return np.clip(image, 0, 255).astype(np.uint8)


def jpeg(key: int, side: int) -> bytes:
    """A photograph as JPEG, quality 90, 4:2:0."""
    return simplejpeg.encode_jpeg(photograph(key, side), QUALITY, colorsubsampling="420")


def make_images(folder: Path, count: int, side: int, seed: int) -> Images:
    """Draw `count` images of `side` x `side` and write them as shards and as a tree of files.

    4 ms an image of 256 x 256. The same seed gives the same bytes.
    """
    tree, shards = folder / "tree", folder / "shards"
    for name in range(NUM_CLASSES):
        (tree / f"{name:02d}").mkdir(parents=True)
    shards.mkdir()
    total = 0

    def samples(start: int, stop: int) -> Iterator[dict[str, str | bytes]]:
        nonlocal total
        for number in range(start, stop):
            data = jpeg(key_of(seed, "photograph", number), side)
            label = number % NUM_CLASSES
            (tree / f"{label:02d}" / f"{number:06d}.jpg").write_bytes(data)
            total += len(data)
            yield {"__key__": f"{number:06d}", "jpg": data, "cls": str(label).encode()}

    bounds = [count * i // _NUM_SHARDS for i in range(_NUM_SHARDS + 1)]
    for number, (start, stop) in enumerate(pairwise(bounds)):
        write_shard(shards / f"train-{number:06d}.tar", samples(start, stop))
    index = build_index(shards)
    paths = tuple(str(path) for path in sorted(shards.glob("*.tar")))
    return Images(index, paths, tree, count, side, total // count)
