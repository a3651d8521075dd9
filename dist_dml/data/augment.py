"""From a decoded image to the pixels that the network sees. Every random draw comes from one key.

Dimensions: H, W source pixels; S = `image.size`; C channels. Coordinates are pixel edges: pixel i
covers [i, i + 1), so that resizing by any factor keeps the picture where it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8

from dist_dml.config import AugmentConfig, ImageConfig
from dist_dml.keyed_random import generator

# OpenCV would start its own threads in every loader process.
cv2.setNumThreads(0)

_CROP_ATTEMPTS = 10
_NUM_DRAWS = 16 + 4 * _CROP_ATTEMPTS


@dataclass(frozen=True)
class _Box:
    """A rectangle of the source image, in source pixels."""

    left: float
    top: float
    width: float
    height: float


def evaluation_transform(
    image: UInt8[np.ndarray, "H W C"], config: ImageConfig
) -> UInt8[np.ndarray, "S S C"]:
    """Short side to `config.resize`, centre crop of S x S; `resize=0` resizes the whole image.

    Equal to cropping S / resize of the short side from the centre and resizing that once, by area
    averaging where it shrinks.
    """
    return _cut(image, _centre_box(image, config), config.size)


def train_transform(
    image: UInt8[np.ndarray, "H W C"], config: ImageConfig, augment: AugmentConfig, key: int
) -> UInt8[np.ndarray, "S S C"]:
    """A random view of the image; a pure function of its arguments.

    Crop (area and aspect ratio as torchvision's RandomResizedCrop), mirror, rotation, zoom and
    shift are one affine warp, with the border replicated; colour and noise follow. Without any
    augmentation it equals `evaluation_transform`. Each kind of change has its own draws, so that
    switching one on leaves the others as they were.

    Args:
        image: decoded image.
        config: size and crop.
        augment: the changes.
        key: see `keyed_random.key_of`.
    """
    random = generator(key)
    draws = random.random(_NUM_DRAWS).tolist()
    box = _centre_box(image, config)
    if augment.crop_scale != (1.0, 1.0):
        box = _random_box(image, augment, draws[16:])
    mirror = draws[0] < augment.horizontal_flip
    if augment.rotation_degrees or augment.shift or augment.zoom != (1.0, 1.0):
        view = _warp(image, box, config.size, augment, draws[1:5], mirror)
    else:
        view = _cut(image, box, config.size)
        if mirror:
            view = np.ascontiguousarray(view[:, ::-1])
    view = _recolour(view, augment, draws[5:9])
    if augment.noise:
        noise = random.standard_normal(view.shape, dtype=np.float32) * np.float32(augment.noise)
        view = np.clip(np.rint(view + noise), 0, 255).astype(np.uint8)
    return view


def _centre_box(image: np.ndarray, config: ImageConfig) -> _Box:
    height, width = image.shape[:2]
    if not config.resize:
        return _Box(0.0, 0.0, float(width), float(height))
    side = min(height, width) * config.size / config.resize
    return _Box((width - side) / 2, (height - side) / 2, float(side), float(side))


def _random_box(image: np.ndarray, augment: AugmentConfig, draws: list[float]) -> _Box:
    """RandomResizedCrop: ten tries at an area share and a log-uniform ratio, then a centre crop."""
    height, width = image.shape[:2]
    low, high = augment.crop_scale
    narrow, wide = augment.crop_ratio
    for start in range(0, 4 * _CROP_ATTEMPTS, 4):
        share, tilt, across, down = draws[start : start + 4]
        area = height * width * (low + (high - low) * share)
        ratio = math.exp(math.log(narrow) + math.log(wide / narrow) * tilt)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return _Box(float(left), float(top), float(w), float(h))
    ratio = min(max(width / height, narrow), wide)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    w, h = max(w, 1), max(h, 1)
    return _Box((width - w) / 2, (height - h) / 2, float(w), float(h))


def _cut(image: np.ndarray, box: _Box, size: int) -> np.ndarray:
    """Resize one box of the image to S x S, its edges rounded to whole pixels."""
    height, width = image.shape[:2]
    w, h = min(max(round(box.width), 1), width), min(max(round(box.height), 1), height)
    left = min(max(round(box.left), 0), width - w)
    top = min(max(round(box.top), 0), height - h)
    part = image[top : top + h, left : left + w]
    if (h, w) == (size, size):
        return np.ascontiguousarray(part)
    shrinks = h >= size and w >= size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    # A slice of an image is no OpenCV matrix when it has one channel as third axis.
    resized = cv2.resize(np.ascontiguousarray(part), (size, size), interpolation=method)
    return resized.reshape(size, size, image.shape[2])


def _warp(
    image: np.ndarray,
    box: _Box,
    size: int,
    augment: AugmentConfig,
    draws: list[float],
    mirror: bool,
) -> np.ndarray:
    """Rotate, zoom, shift and mirror the box's content within S x S.

    Bilinear sampling aliases where it shrinks. The image is first shrunk by area until the rest of
    the reduction is at most 2, then warped at twice the size and averaged by 2 x 2.
    """
    low, high = augment.zoom
    zoom = low + (high - low) * draws[0]
    angle = math.radians(augment.rotation_degrees * (2 * draws[1] - 1))
    shift_x, shift_y = (augment.shift * size * (2 * draw - 1) for draw in draws[2:4])

    height, width = image.shape[:2]
    reduction = max(box.width, box.height) / (size * zoom)
    factor_x = factor_y = 1.0
    if reduction > 2:
        w, h = max(1, round(width * 2 / reduction)), max(1, round(height * 2 / reduction))
        image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
        factor_x, factor_y = w / width, h / height
        reduction = 2
    oversample = 2 if reduction > 1.25 else 1

    # Output edge coordinate u -> source: centre + scale * R(-angle) / zoom * (u - S/2 - shift).
    side = size * oversample
    scale_x = box.width / side * factor_x / zoom * (-1 if mirror else 1)
    scale_y = box.height / side * factor_y / zoom
    cos, sin = math.cos(angle), math.sin(angle)
    linear = np.array([[scale_x * cos, scale_x * sin], [-scale_y * sin, scale_y * cos]])
    centre = np.array(
        [(box.left + box.width / 2) * factor_x, (box.top + box.height / 2) * factor_y]
    )
    middle = np.array([side / 2 + shift_x * oversample, side / 2 + shift_y * oversample])
    # OpenCV counts pixel centres: half a pixel between its coordinates and edges, on both sides.
    offset = centre - linear @ (middle - 0.5) - 0.5
    view = cv2.warpAffine(
        image,
        np.column_stack([linear, offset]),
        (side, side),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    if oversample > 1:
        view = cv2.resize(view, (size, size), interpolation=cv2.INTER_AREA)
    return view.reshape(size, size, -1)


def _recolour(view: np.ndarray, augment: AugmentConfig, draws: list[float]) -> np.ndarray:
    """Brightness, contrast about the mean grey, saturation, hue, in this order."""
    brightness = 1 + augment.brightness * (2 * draws[0] - 1)
    contrast = 1 + augment.contrast * (2 * draws[1] - 1)
    if augment.brightness or augment.contrast:
        grey = float(_grey(view).mean()) * brightness
        levels = np.arange(256) * (brightness * contrast) + grey * (1 - contrast)
        table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
        view = table[view]
    if view.shape[2] == 1:
        return view
    if augment.saturation:
        share = 1 + augment.saturation * (2 * draws[2] - 1)
        grey = np.repeat(_grey(view)[:, :, None], 3, axis=2)
        view = cv2.addWeighted(view, share, grey, 1 - share, 0)
    if augment.hue:
        turned = cv2.cvtColor(view, cv2.COLOR_RGB2HSV)
        # OpenCV's 8-bit hue has 180 steps for the whole circle.
        steps = round(180 * augment.hue * (2 * draws[3] - 1))
        turned[:, :, 0] = (turned[:, :, 0].astype(np.int16) + steps) % 180
        view = cv2.cvtColor(turned, cv2.COLOR_HSV2RGB)
    return view


def _grey(view: np.ndarray) -> np.ndarray:
    return view[:, :, 0] if view.shape[2] == 1 else cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)
