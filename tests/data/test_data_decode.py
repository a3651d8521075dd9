"""Decoding: reduced where that is near the whole; damaged bytes end in nothing but BadSample."""

from __future__ import annotations

import io
import struct
import time
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from dist_dml.data.decode import (
    MAX_PIXELS,
    checked_size,
    decode,
    decode_reduced,
    possible_reduction,
)
from dist_dml.data.faults import BadSample


def picture(height: int, width: int) -> np.ndarray:
    """Waves of all lengths down to four pixels."""
    random = np.random.default_rng(height)
    image = np.full((height, width, 3), 128.0, np.float32)
    for length, level in ((64, 45), (16, 25), (4, 12)):
        shape = (max(2, height // length), max(2, width // length), 3)
        waves = random.standard_normal(shape).astype(np.float32) * level
        image += cv2.resize(waves, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255).astype(np.uint8)


SMALL = picture(43, 61)


def encoded(image: np.ndarray, kind: str, mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


FILES = {
    "jpeg": encoded(SMALL, "jpeg"),
    "progressive jpeg": encoded(SMALL, "jpeg", progressive=True),
    "grey jpeg": encoded(SMALL, "jpeg", "L"),
    "cmyk jpeg": encoded(SMALL, "jpeg", "CMYK"),
    "jpeg with exif": encoded(SMALL, "jpeg", exif=b"Exif\0\0" + bytes(20)),
    "png": encoded(SMALL, "png"),
    "palette png": encoded(SMALL, "png", "P", transparency=b"\x00\x80"),
    "png with alpha": encoded(SMALL, "png", "RGBA"),
    "grey png with alpha": encoded(SMALL, "png", "LA"),
    "1-bit png": encoded(SMALL, "png", "1"),
    "16-bit png": cv2.imencode(".png", SMALL[..., ::-1].astype(np.uint16) * 257)[1].tobytes(),
    "animated png": encoded(SMALL, "png", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    "webp": encoded(SMALL, "webp"),
    "webp with exif": encoded(SMALL, "webp", exif=b"Exif\0\0" + bytes(20)),
    "lossless webp": encoded(SMALL, "webp", lossless=True),
    "animated webp": encoded(
        SMALL, "webp", save_all=True, append_images=[Image.fromarray(SMALL[::-1].copy())]
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_has_the_pixels_that_its_header_says(name):
    assert checked_size(FILES[name]) == (43, 61)
    for channels in (1, 3):
        image = decode(FILES[name], channels)
        assert (image.shape, image.dtype) == ((43, 61, channels), np.uint8)
    if name not in ("1-bit png", "palette png"):
        grey = decode(encoded(SMALL, "png"), 1).astype(int)
        assert np.abs(decode(FILES[name], 1) - grey).mean() < 8


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_are_refused_or_give_an_image_of_the_size_that_the_header_says(name):
    """Cut short, and bytes changed anywhere or among the first 64: never another exception."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    refusals = []
    for trial in range(60):
        data = bytearray(FILES[name])
        if trial % 3 == 0:
            data = data[: random.integers(0, len(data))]
        else:
            end = len(data) if trial % 3 == 1 else 64
            for place in random.integers(0, end, random.integers(1, 6)):
                data[place] = random.integers(0, 256)
        data, channels = bytes(data), 1 + 2 * (trial % 2)
        try:
            size = checked_size(data)
            if size[0] * size[1] > 1e6:
                continue  # A header may claim 89 million pixels, which takes its time.
            image, _ = decode_reduced(data, channels, size, 1)
            assert (image.shape, image.dtype) == ((*size, channels), np.uint8)
        except BadSample as error:
            refusals.append((error.kind, str(error)))
    assert {kind for kind, _ in refusals} <= {"not_an_image", "too_large", "undecodable"}
    assert not any("\n" in reason for _, reason in refusals)
    assert len(refusals) >= 15  # The third that was cut short, almost all of it.


def test_a_file_that_holds_another_size_than_its_header_says_is_refused():
    """Like a WebP whose canvas and picture differ; libraries believe one or the other."""
    inner = FILES["webp"][12:]
    canvas = struct.pack("<I", 0) + (99).to_bytes(3, "little") + (79).to_bytes(3, "little")
    chunks = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + inner
    data = b"RIFF" + struct.pack("<I", len(chunks)) + chunks
    assert checked_size(data) == (80, 100)
    with pytest.raises(BadSample):
        decode(data, 3)


def test_a_jpeg_that_says_too_many_pixels_is_refused_by_its_header():
    data = bytearray(FILES["jpeg"])
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 60_000, MAX_PIXELS // 60_000 + 1)
    with pytest.raises(BadSample, match="pixels exceed the limit") as caught:
        decode(bytes(data), 3)
    assert caught.value.kind == "too_large"


def test_a_png_whose_chunk_claims_gigabytes_costs_nothing():
    data = bytearray(FILES["palette png"])
    start = data.index(b"PLTE") - 4
    data[start : start + 4] = (2**32 - 2**20).to_bytes(4, "big")
    started = time.process_time()
    with pytest.raises(BadSample):
        decode(bytes(data), 3)
    assert time.process_time() - started < 2  # OpenCV alone clears 4 GB of memory first.


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("subsampling", ["420", "444"])
@pytest.mark.parametrize("shape", [(256, 384), (257, 391)])
@pytest.mark.parametrize("channels", [1, 3])
def test_reduced_decoding_is_near_the_mean_of_the_pixels(reduction, subsampling, shape, channels):
    data = simplejpeg.encode_jpeg(picture(*shape), quality=90, colorsubsampling=subsampling)
    small, factor = decode_reduced(data, channels, shape, reduction)
    assert factor == reduction
    assert small.shape == (-(-shape[0] // factor), -(-shape[1] // factor), channels)
    whole = decode(data, channels).astype(float)
    # Whole blocks of factor x factor: the last row and column may stand for fewer pixels.
    h, w = shape[0] // factor, shape[1] // factor
    means = whole[: h * factor, : w * factor].reshape(h, factor, w, factor, channels)
    difference = np.abs(small[:h, :w] - means.mean(axis=(1, 3)))
    assert difference.mean() < 2.5
    again, _ = decode_reduced(data, channels, shape, reduction)
    assert np.array_equal(small, again)


def test_what_only_pillow_can_read_is_decoded_whole():
    """Bytes between the tables: simplejpeg is strict about them, Pillow is not."""
    data = simplejpeg.encode_jpeg(picture(256, 256), quality=90)
    start = data.index(b"\xff\xdb")
    odd = data[:start] + b"\x00\x00" + data[start:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(odd)
    image, factor = decode_reduced(odd, 3, (256, 256), 4)
    assert (image.shape, factor) == ((256, 256, 3), 1)
    assert np.abs(image.astype(int) - decode(data, 3)).mean() < 1


def test_only_large_jpegs_are_reduced_and_never_below_what_is_wanted():
    jpeg = simplejpeg.encode_jpeg(picture(500, 400))
    for box, least, wanted in [
        ((500, 400), 224, 1),
        ((448, 400), 200, 2),
        ((500, 399), 200, 1),
        ((500, 400), 100, 4),
        ((500, 400), 50, 8),
        ((500, 400), 1, 8),
    ]:
        assert possible_reduction(jpeg, (500, 400), box, least) == wanted
    assert possible_reduction(FILES["png"], (500, 400), (500, 400), 50) == 1
    assert possible_reduction(FILES["webp"], (500, 400), (500, 400), 50) == 1
    assert possible_reduction(jpeg, (127, 400), (127, 400), 8) == 1
