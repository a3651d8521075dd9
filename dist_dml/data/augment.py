"""From the bytes of an image to the pixels that the network sees. Every draw comes from one key.

Dimensions: H, W source pixels; S = `image.size`; C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8

from dist_dml.data.crops import CROP_DRAWS, Box, centre_box, cut, mirror, random_box
from dist_dml.data.decode import checked_size, decode_reduced, possible_reduction
from dist_dml.data_config import AugmentConfig, ImageConfig
from dist_dml.keyed_random import generator

_NUM_DRAWS = 16 + CROP_DRAWS


def training_view(
    data: bytes, image: ImageConfig, augment: AugmentConfig, key: int
) -> tuple[UInt8[np.ndarray, "S S C"], bool]:
    """A random view of an encoded image, and whether the device must still mirror it.

    Equal to `train_transform(decode(data, C), ...)` once it is mirrored left and right where the
    second value says so, except for large JPEGs: of one whose crop has at least twice the pixels of
    the view in both directions, only 1/2, 1/4 or 1/8 of the size is decoded, so that the crop still
    has at least the view's pixels. That moves the crop's edges by less than a pixel of the view,
    and changes pixels by a few grey levels. A pure function of its arguments.

    Raises:
        BadSample: not an image, or damaged.
    """
    height, width = checked_size(data)
    random = generator(key)
    draws = random.random(_NUM_DRAWS).tolist()
    box = _training_box(height, width, image, augment, draws)
    least = image.size * _zoom(augment, draws)
    pixels, box = _decode_for(data, (height, width), box, image.channels, least)
    return _random_view(pixels, box, image, augment, draws, random)


def evaluation_view(data: bytes, image: ImageConfig) -> UInt8[np.ndarray, "S S C"]:
    """`evaluation_transform(decode(data, C), image)`; large JPEGs are decoded reduced.

    See `training_view` for when, and how near the two are.

    Raises:
        BadSample: not an image, or damaged.
    """
    height, width = checked_size(data)
    box = centre_box(height, width, image)
    pixels, box = _decode_for(data, (height, width), box, image.channels, image.size)
    return cut(pixels, box, image.size)


def evaluation_transform(
    image: UInt8[np.ndarray, "H W C"], config: ImageConfig
) -> UInt8[np.ndarray, "S S C"]:
    """Short side to `config.resize`, centre crop of S x S; `resize=0` resizes the whole image.

    Equal to cropping S / resize of the short side from the centre and resizing that once, by area
    averaging where it shrinks.
    """
    return cut(image, centre_box(image.shape[0], image.shape[1], config), config.size)


def train_transform(
    image: UInt8[np.ndarray, "H W C"], config: ImageConfig, augment: AugmentConfig, key: int
) -> UInt8[np.ndarray, "S S C"]:
    """A random view of a decoded image; a pure function of its arguments.

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
    box = _training_box(image.shape[0], image.shape[1], config, augment, draws)
    view, mirrored = _random_view(image, box, config, augment, draws, random)
    return mirror(view) if mirrored else view


def _training_box(
    height: int, width: int, config: ImageConfig, augment: AugmentConfig, draws: Sequence[float]
) -> Box:
    if augment.crop_scale == (1.0, 1.0):
        return centre_box(height, width, config)
    return random_box(height, width, augment, draws[16:])


def _zoom(augment: AugmentConfig, draws: Sequence[float]) -> float:
    low, high = augment.zoom
    return low + (high - low) * draws[1]


def _decode_for(
    data: bytes, size: tuple[int, int], box: Box, channels: int, least: float
) -> tuple[np.ndarray, Box]:
    """Pixels of which the box keeps `least` in both directions, and the box in their coordinates.

    `least` may exceed the box: then nothing is reduced.
    """
    reduction = possible_reduction(data, size, (box.height, box.width), least)
    pixels, reduction = decode_reduced(data, channels, size, reduction)
    return pixels, box.reduced(reduction)


def _random_view(
    image: np.ndarray,
    box: Box,
    config: ImageConfig,
    augment: AugmentConfig,
    draws: Sequence[float],
    random: np.random.Generator,
) -> tuple[np.ndarray, bool]:
    """The view of a box, and whether it is still to be mirrored: a warp has done so already."""
    mirrored = draws[0] < augment.horizontal_flip
    if augment.rotation_degrees or augment.shift or augment.zoom != (1.0, 1.0):
        view = _warp(image, box, config.size, augment, draws, mirrored)
        mirrored = False
    else:
        view = cut(image, box, config.size)
    view = _recolour(view, augment, draws[5:9])
    if augment.noise:
        noise = random.standard_normal(view.shape, dtype=np.float32) * np.float32(augment.noise)
        if mirrored:
            noise = noise[:, ::-1]  # So that it lies as drawn once the view is mirrored.
        view = np.clip(np.rint(view + noise), 0, 255).astype(np.uint8)
    return view, mirrored


def _warp(
    image: np.ndarray,
    box: Box,
    size: int,
    augment: AugmentConfig,
    draws: Sequence[float],
    mirrored: bool,
) -> np.ndarray:
    """Rotate, zoom, shift and mirror the box's content within S x S.

    Bilinear sampling aliases where it shrinks. The image is first shrunk by area until the rest of
    the reduction is at most 2, then warped at twice the size and averaged by 2 x 2.
    """
    zoom = _zoom(augment, draws)
    angle = math.radians(augment.rotation_degrees * (2 * draws[2] - 1))
    shift_x, shift_y = (augment.shift * size * (2 * draw - 1) for draw in draws[3:5])

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
    scale_x = box.width / side * factor_x / zoom * (-1 if mirrored else 1)
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


def _recolour(view: np.ndarray, augment: AugmentConfig, draws: Sequence[float]) -> np.ndarray:
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
