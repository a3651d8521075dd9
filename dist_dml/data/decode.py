"""From the bytes of an image to its pixels. Nothing is ever unpickled or executed.

Dimensions: H, W pixels as the header states them; C channels; h, w decoded pixels.
"""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from dist_dml.data.faults import BadSample
from dist_dml.data.image_header import image_size

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, as Pillow's limit: a small file can claim a huge picture."""

_REDUCTIONS = (8, 4, 2)
# Below this side a JPEG is decoded whole: that takes less than 0.1 ms, and its pixels stay as they
# are stored. It also keeps away from sides of a few pixels, where 1/2 and 3/8 have the same size.
_LEAST_SIDE_TO_REDUCE = 128


def decode(data: bytes, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Decode a JPEG, PNG or WebP, told apart by its first bytes, to grey (C=1) or RGB (C=3).

    JPEG goes to simplejpeg, the others to OpenCV, and what they refuse to Pillow: strict decoders
    reject files that others can read. The EXIF orientation is not applied, by none of the three.
    Transparency is dropped, 16 bits become 8.

    Raises:
        BadSample: not such an image, damaged, or of more than 89 million pixels.
    """
    return decode_reduced(data, channels, checked_size(data), 1)[0]


def checked_size(data: bytes) -> tuple[int, int]:
    """Height and width as the header states them, without decoding. 1 to 3 us.

    Raises:
        BadSample: not a JPEG, PNG or WebP, without pixels, or of more than 89 million.
    """
    height, width = image_size(data)
    if height * width == 0:
        raise BadSample("it is not a JPEG, PNG or WebP image, or has no pixels", "not_an_image")
    if height * width > MAX_PIXELS:
        raise BadSample(
            f"{width} x {height} pixels exceed the limit of {MAX_PIXELS:,}", "too_large"
        )
    return height, width


def possible_reduction(
    data: bytes, size: tuple[int, int], box: tuple[float, float], least: float
) -> int:
    """The largest of 1, 2, 4, 8 by which an image may be reduced when only a box of it is wanted.

    More than 1 only for a JPEG of at least 128 x 128 whose box keeps `least` pixels in both
    directions: what is resized to `least` afterwards never has to be enlarged for it.

    Args:
        data: the encoded image.
        size: its `checked_size`.
        box: height and width of the part that is wanted, in pixels of the whole image.
        least: pixels that it will be resized to.
    """
    if data[:2] != b"\xff\xd8" or min(size) < _LEAST_SIDE_TO_REDUCE:
        return 1
    return next((factor for factor in _REDUCTIONS if min(box) >= factor * least), 1)


def decode_reduced(
    data: bytes, channels: int, size: tuple[int, int], reduction: int
) -> tuple[UInt8[np.ndarray, "h w C"], int]:
    """Decode at 1/`reduction` of the size, where the file's decoder can do so.

    A JPEG stores blocks of 8 x 8 coefficients; an inverse transform of 4 x 4, 2 x 2 or 1 x 1 of
    them gives an image in which each pixel stands for exactly `reduction` x `reduction` pixels, in
    less time. It is close to averaging those pixels and not equal to it: on photographs 1 to 2 grey
    levels apart on average. Factors other than 2, 4 and 8 save nothing.

    Args:
        data: the encoded image.
        channels: 1 or 3.
        size: its `checked_size`.
        reduction: 1, 2, 4 or 8; see `possible_reduction`.

    Returns:
        Pixels of ceil(H / f) x ceil(W / f), and f: `reduction`, or 1 where only Pillow could read
        the file. Both depend on `data` and the arguments alone.

    Raises:
        BadSample: damaged.
    """
    wanted = (-(-size[0] // reduction), -(-size[1] // reduction))
    image = _decode_fast(data, channels, wanted, reduction)
    if image is None:
        image, wanted, reduction = _decode_pillow(data, channels), size, 1
    if image.shape[:2] != wanted:
        height, width = image.shape[:2]
        raise BadSample(
            f"its header says {size[1]} x {size[0]} pixels and it decodes to {width} x {height}",
            "undecodable",
        )
    return image.reshape(*wanted, channels), reduction


def _decode_fast(
    data: bytes, channels: int, wanted: tuple[int, int], reduction: int
) -> np.ndarray | None:
    if data[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(
                data,
                colorspace="GRAY" if channels == 1 else "RGB",
                min_height=wanted[0],
                min_width=wanted[1],
                min_factor=reduction,
            )
        except ValueError:
            return None
    assert reduction == 1
    if data[:4] == b"\x89PNG" and not _png_chunks_end_inside(data):
        return None
    # RGB takes no longer than OpenCV's own BGR: libpng and libwebp make either (2026-11).
    colour = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), colour | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


def _png_chunks_end_inside(data: bytes) -> bool:
    """Whether every chunk up to the last, IEND, lies within the file. 0.3 us a chunk.

    OpenCV 5.0 allocates and clears what a chunk's length says before it looks for the bytes: four
    changed bytes cost 3.5 GB and 9 s (2026-11). Pillow reads in blocks.
    """
    start = 8
    while start + 12 <= len(data):
        if data[start + 4 : start + 8] == b"IEND":
            return True
        start += 12 + int.from_bytes(data[start : start + 4], "big")
    return False


def _decode_pillow(data: bytes, channels: int) -> np.ndarray:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # About transparent palettes and odd metadata: nothing that changes the pixels.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
                return np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except MemoryError:
        raise
    except Exception as error:
        # Damaged bytes bring out any exception of Pillow's parsers, EOFError, KeyError, zlib.error
        # and its own DecompressionBombError among them.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadSample(f"it cannot be decoded ({reason})", "undecodable") from None
