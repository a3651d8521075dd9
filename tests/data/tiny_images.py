"""Small synthetic images: the pixels of each tell which sample it is."""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np

NUM_CLASSES = 5
SHARD_SIZES = {"train-000000": 17, "train-000001": 14, "seen-000000": 6, "test-000000": 11}


def image_of(number: int) -> np.ndarray:
    """The 20 x 24 RGB image of sample `number`: noise that differs in every pixel."""
    return np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    """Encode RGB or grey."""
    colour = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", colour)[1].tobytes()


def samples_of(name: str, start: int) -> list[Mapping[str, str | bytes]]:
    """The samples of one shard; test classes are other ones than training classes."""
    label = "t" if name.startswith("test") else "c"
    return [
        {
            "__key__": f"{name}/{number:04d}",
            "png": png(image_of(number)),
            "cls": f"{label}{number % NUM_CLASSES}".encode(),
        }
        for number in range(start, start + SHARD_SIZES[name])
    ]
