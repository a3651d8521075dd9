"""Pictures with the texture of photographs, drawn from a number, and sets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from dist_dml.data.index import Index
from dist_dml.data.index_command import build_index
from dist_dml.data.shards import write_shard


def photo(number: int, side: int = 96) -> np.ndarray:
    """A (side, 4/3 side) RGB picture: soft colours, discs with edges, a little grain."""
    random = np.random.default_rng([7, number])
    size = (side * 4 // 3, side)
    soft = cv2.resize(random.uniform(0, 255, (7, 9, 3)).astype(np.float32), size)
    for _ in range(8):
        centre = tuple(int(random.integers(0, length)) for length in size)
        colour = [float(level) for level in random.uniform(0, 255, 3)]
        cv2.circle(soft, centre, int(random.integers(side // 12, side // 4)), colour, -1)
    return np.clip(soft + random.normal(0, 4, soft.shape), 0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB")


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def halved(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


def brightened(image: np.ndarray) -> np.ndarray:
    return np.clip(image * 1.1 + 5, 0, 255).astype(np.uint8)


def cropped(image: np.ndarray, share: float) -> np.ndarray:
    """Without `share` of its height and width, taken off at both sides alike."""
    height, width = image.shape[:2]
    top, left = round(height * share / 2), round(width * share / 2)
    return image[top : height - top, left : width - left]


def pack(folder: Path, splits: Mapping[str, Sequence[tuple[str, str, bytes]]]) -> Index:
    """A data set with a shard for each split, of (key, class, JPEG or PNG bytes)."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, samples in splits.items():
        write_shard(
            folder / f"{split}-000000.tar",
            [
                {
                    "__key__": key,
                    "jpg" if data[:2] == b"\xff\xd8" else "png": data,
                    "cls": label.encode(),
                }
                for key, label, data in samples
            ],
        )
    return build_index(folder)
