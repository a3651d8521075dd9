"""Height and width of an image from its first bytes, without decoding it."""

from __future__ import annotations

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG that start a frame and state its size (ITU-T T.81, table B.1)."""
_BARE = frozenset((0x01, *range(0xD0, 0xD9)))
"""Markers without a length."""


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width that a JPEG, PNG or WebP states; (0, 0) if it is none or states none.

    1 to 3 us. It looks at headers only: whether the pixels are there is for the decoder to say.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return _jpeg_size(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            if len(data) < 24:
                return 0, 0
            return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_size(data)
    except IndexError:  # The data end inside a header.
        pass
    return 0, 0


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Goes from marker to marker up to the frame's; thumbnails lie inside a skipped segment."""
    position = 2
    while True:
        if data[position] != 0xFF:
            return 0, 0
        marker = data[position + 1]
        if marker in _FRAMES:
            height = data[position + 5] << 8 | data[position + 6]
            return height, data[position + 7] << 8 | data[position + 8]
        if marker == 0xFF:  # Markers may be preceded by any number of these.
            position += 1
        elif marker in _BARE:
            position += 2
        elif marker == 0xDA:  # Pixels before any frame.
            return 0, 0
        else:
            position += 2 + (data[position + 2] << 8 | data[position + 3])


def _webp_size(data: bytes) -> tuple[int, int]:
    """The three kinds of WebP state their size in three ways (RFC 9649, sections 2.5 to 2.7)."""
    if len(data) < 30:
        return 0, 0
    kind = data[12:16]
    if kind == b"VP8 ":
        width = int.from_bytes(data[26:28], "little") & 0x3FFF
        return int.from_bytes(data[28:30], "little") & 0x3FFF, width
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        return int.from_bytes(data[27:30], "little") + 1, width
    return 0, 0
