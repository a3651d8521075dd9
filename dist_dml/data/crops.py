"""Which part of an image becomes the view, and cutting it out.

Dimensions: H, W source pixels; S = `image.size`; C channels. Coordinates are pixel edges: pixel i
covers [i, i + 1), so that resizing by any factor keeps the picture where it is. Boxes are pure
functions of height, width, configuration and draws: they are known from the header, before
anything is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8

from dist_dml.data_config import AugmentConfig, ImageConfig

# OpenCV would start its own threads in every loader process.
cv2.setNumThreads(0)

_CROP_ATTEMPTS = 10
CROP_DRAWS = 4 * _CROP_ATTEMPTS
"""Uniform draws that `random_box` takes."""


@dataclass(frozen=True)
class Box:
    """A rectangle of the source image, in source pixels."""

    left: float
    top: float
    width: float
    height: float

    def reduced(self, factor: int) -> Box:
        """The same part of the image decoded at 1/`factor` (exact: edges need not be whole)."""
        if factor == 1:
            return self
        sides = (self.left, self.top, self.width, self.height)
        return Box(*(side / factor for side in sides))


def centre_box(height: int, width: int, config: ImageConfig) -> Box:
    """S / resize of the short side from the centre; the whole image where `resize` is 0."""
    if not config.resize:
        return Box(0.0, 0.0, float(width), float(height))
    side = min(height, width) * config.size / config.resize
    return Box((width - side) / 2, (height - side) / 2, float(side), float(side))


def random_box(height: int, width: int, augment: AugmentConfig, draws: Sequence[float]) -> Box:
    """RandomResizedCrop: ten tries at an area share and a log-uniform ratio, then a centre crop."""
    low, high = augment.crop_scale
    narrow, wide = augment.crop_ratio
    for start in range(0, CROP_DRAWS, 4):
        share, tilt, across, down = draws[start : start + 4]
        area = height * width * (low + (high - low) * share)
        ratio = math.exp(math.log(narrow) + math.log(wide / narrow) * tilt)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return Box(float(left), float(top), float(w), float(h))
    ratio = min(max(width / height, narrow), wide)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    w, h = max(w, 1), max(h, 1)
    return Box((width - w) / 2, (height - h) / 2, float(w), float(h))


def cut(image: UInt8[np.ndarray, "H W C"], box: Box, size: int) -> UInt8[np.ndarray, "S S C"]:
    """Resize one box of the image to S x S, its edges rounded to whole pixels.

    By area averaging where it shrinks, bilinear where it grows. Copies nothing but the result.
    """
    height, width = image.shape[:2]
    w, h = min(max(round(box.width), 1), width), min(max(round(box.height), 1), height)
    left = min(max(round(box.left), 0), width - w)
    top = min(max(round(box.top), 0), height - h)
    part = image[top : top + h, left : left + w]
    if (h, w) == (size, size):
        return np.ascontiguousarray(part)
    shrinks = h >= size and w >= size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    # A part of a matrix is one for OpenCV too, but not with one channel as third axis.
    source = part[:, :, 0] if image.shape[2] == 1 else part
    return cv2.resize(source, (size, size), interpolation=method).reshape(size, size, -1)


def mirror(view: UInt8[np.ndarray, "S S C"]) -> UInt8[np.ndarray, "S S C"]:
    """Left and right swapped, as a new array.

    5 us at 224 x 224 x 3, where copying `view[:, ::-1]` takes 100 us and torch's flip of a batch
    150 us an image (CPU, 2026-11).
    """
    return cv2.flip(view, 1).reshape(view.shape)
