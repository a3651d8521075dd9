"""From a place in a shard to the pixels of an image. Reads by offset, decodes without pickles."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8

from dist_dml.data.index import Index
from dist_dml.errors import RunError

MAX_PIXELS = 89_478_485
"""Largest image that is decoded, as Pillow's limit: a small file can claim a huge picture."""
_OPEN_SHARDS = 256


class BadSample(Exception):
    """One sample cannot be read; the message is the reason. Becomes a `RunError` with its name."""


class Reader:
    """Reads images of a data set by (shard, offset, size). Picklable; opens tars on first use.

    At most 256 tars are open at a time, so that a process stays below its limit of descriptors.
    """

    def __init__(self, paths: Sequence[str], channels: int) -> None:
        """
        Args:
            paths: the tar of each shard code.
            channels: 1 decodes to grey, 3 to RGB.
        """
        self._paths = tuple(paths)
        self._channels = channels
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> tuple[tuple[str, ...], int]:
        return self._paths, self._channels

    def __setstate__(self, state: tuple[tuple[str, ...], int]) -> None:
        self.__init__(*state)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes of a tar from `offset` on. 10-25 us where the page cache holds them.

        Raises:
            BadSample: if the tar cannot be opened or ends before.
        """
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise BadSample(f"cannot read the shard ({error.strerror})") from None
        if len(data) != size:
            raise BadSample(f"the shard ends after {len(data)} of its {size} bytes")
        return data

    def image(
        self, shard: int, offset: int, size: int, checksum: int
    ) -> UInt8[np.ndarray, "H W C"]:
        """The decoded image at a place, in the reader's number of channels.

        Raises:
            BadSample: if its bytes are not those that were indexed, or not an image.
        """
        data = self.read(shard, offset, size)
        if zlib.crc32(data) != checksum:
            raise BadSample("its bytes changed after they were indexed (checksum differs)")
        return decode(data, self._channels)

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if len(self._descriptors) >= _OPEN_SHARDS:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptors[shard]


def open_reader(index: Index, channels: int) -> Reader:
    """A reader of all shards of a data set."""
    return Reader([str(Path(index.folder) / shard) for shard in index.shards], channels)


def read_image(index: Index, reader: Reader, sample_id: int) -> UInt8[np.ndarray, "H W C"]:
    """The stored image of one sample, before any transform.

    Raises:
        RunError: names shard, key and reason.
    """
    columns = (index.shard, index.offset, index.size, index.checksum)
    try:
        return reader.image(*(int(column[sample_id]) for column in columns))
    except BadSample as error:
        raise bad_sample_error(index, sample_id, str(error)) from None


def bad_sample_error(index: Index, sample_id: int, reason: str) -> RunError:
    """The one line that stops a run at an unreadable sample."""
    shard = index.shards[index.shard[sample_id]]
    return RunError(
        f"shard {shard}: key {index.key(sample_id)} cannot be read: {reason}; "
        f"repair or remove it and run `dist-dml index {index.folder}`"
    )


def decode(data: bytes, channels: int) -> UInt8[np.ndarray, "H W C"]:
    """Decode a JPEG, PNG or WebP, told apart by its first bytes, to grey (C=1) or RGB (C=3).

    JPEG goes to simplejpeg, the others to OpenCV, and what they refuse to Pillow: strict decoders
    reject files that others can read. The EXIF orientation is not applied, by none of the three.

    Raises:
        BadSample: not such an image, damaged, or of more than 89 million pixels.
    """
    try:
        height, width = _header_size(data)
    except (ValueError, struct.error) as error:
        raise BadSample(str(error) or "its header is damaged") from None
    if height * width > MAX_PIXELS:
        raise BadSample(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS:,}")
    if height * width == 0:
        raise BadSample("it has no pixels")
    image = _decode_fast(data, channels)
    if image is None:
        image = _decode_pillow(data, channels)
    return image.reshape(image.shape[0], image.shape[1], channels)


def _decode_fast(data: bytes, channels: int) -> np.ndarray | None:
    if data[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(data, colorspace="GRAY" if channels == 1 else "RGB")
        except ValueError:
            return None
    colour = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), colour | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None


def _decode_pillow(data: bytes, channels: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            return np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadSample(f"it cannot be decoded ({reason})") from None


def _header_size(data: bytes) -> tuple[int, int]:
    """Height and width as the header states them, without decoding.

    Raises:
        ValueError: if the data start like none of the three formats.
    """
    if data[:3] == b"\xff\xd8\xff":
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return int(height), int(width)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        width, height = struct.unpack_from(">II", data, 16)
        return height, width
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    raise ValueError("it is not a JPEG, PNG or WebP image")


def _webp_size(data: bytes) -> tuple[int, int]:
    """The three kinds of WebP state their size in three ways (RFC 9649, sections 2.5 to 2.7)."""
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ((bits >> 14) & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        return height, width
    raise ValueError("its WebP header is damaged")
