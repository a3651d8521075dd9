"""Which records of a RecordIO file hold an image, and of which class; every record is checked.

insightface's record 0 holds no image but two labels (L0, L1): images have the keys 1..L0-1, and
L0..L1-1 are records of identities, without image. They are float32, which cannot state every number
above 2^24 (16.8 million), so a record is an image here if it holds one. im2rec and insightface's
shuffle_rec.py write no such record 0: there, record 0 is an image.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt32

from dist_dml.data.pack.recordio_reader import (
    FRAME,
    HEADER,
    LENGTH_BITS,
    LONGEST,
    MAGIC,
    damaged,
    read_record,
    unpack,
)
from dist_dml.data.progress import ProgressLine
from dist_dml.errors import UsageError

_HEAD = FRAME + HEADER + 8
"""Bytes of a record that are looked at: its frame, its header, its first two labels."""
_BLOCK = 1 << 16
_LARGEST_LABEL = 1 << 24


@dataclass(frozen=True, eq=False)
class ImageRecords:
    """The images of a `.rec`, in the order of their offsets; arrays of one entry an image.

    Attributes:
        key: number of the record in the `.idx`; its position where there is none.
        offset: first byte of its first part.
        label: its first label.
        size: bytes of all its parts with their frames, without the last padding.
        without_image: records that hold none: record 0 and identities.
    """

    key: Int64[np.ndarray, " n"]
    offset: Int64[np.ndarray, " n"]
    label: Int64[np.ndarray, " n"]
    size: Int64[np.ndarray, " n"]
    without_image: int


@dataclass(frozen=True, eq=False)
class _Heads:
    """What the first part of each record says; `labels` are the first two, 0 where there are less.

    `rest` is the number of bytes behind header and labels.
    """

    flag: UInt32[np.ndarray, " n"]
    labels: Float32[np.ndarray, "n 2"]
    rest: Int64[np.ndarray, " n"]
    size: Int64[np.ndarray, " n"]


def read_images(path: Path, keys: np.ndarray, offsets: np.ndarray) -> ImageRecords:
    """Which records hold images, and their labels; checks the frame and header of every record.

    Touches one page a record, in order: as fast as the disk reads, and 0.4 s a million besides
    (2026-11).

    Args:
        path: the `.rec`.
        keys: of the records, ascending with `offsets`.
        offsets: of the records.

    Raises:
        UsageError: a record is damaged, a label is no whole number from 0 on, or an image that
            record 0 promises is missing.
    """
    heads = _read_heads(path, offsets)
    empty = heads.rest == 0
    first = int(np.argmin(keys)) if len(keys) else 0
    if len(keys) and empty[first] and heads.flag[first] >= 2:
        check_range(path, keys, offsets, empty, heads.labels[first])
    elif empty.any():
        bad = int(offsets[np.flatnonzero(empty)[0]])
        raise damaged(path, bad, "a record without image, and no record 0 that says why")
    label = heads.labels[~empty, 0]
    wrong = ~(np.isfinite(label) & (label >= 0) & (label == np.floor(label)))
    wrong |= label >= _LARGEST_LABEL
    if wrong.any():
        bad = int(np.flatnonzero(wrong)[0])
        raise damaged(
            path, int(offsets[~empty][bad]), f"label {label[bad]} is no integer in 0..2^24-1"
        )
    return ImageRecords(
        keys[~empty], offsets[~empty], label.astype(np.int64), heads.size[~empty], int(empty.sum())
    )


def check_range(
    path: Path,
    keys: np.ndarray,
    offsets: np.ndarray,
    empty: Bool[np.ndarray, " n"],
    limits: Float32[np.ndarray, " 2"],
) -> None:
    """What insightface's record 0 says of the keys, up to the rounding of float32.

    Args:
        path: for messages.
        keys: of all records.
        offsets: of all records.
        empty: which of them hold no image.
        limits: labels of record 0: images have the keys below the first.

    Raises:
        UsageError: a record with such a key holds no image, or there are fewer images.
    """
    slack = float(np.spacing(np.abs(limits[0])))
    promised = float(limits[0]) - slack
    lost = empty & (keys > keys.min()) & (keys < promised)
    if lost.any():
        place = np.flatnonzero(lost)[0]
        raise damaged(path, int(offsets[place]), f"record {keys[place]} has no image")
    images = int(np.sum(~empty))
    if images < promised - 1:
        raise UsageError(
            f"{path}: record 0 promises {limits[0] - 1:,.0f} images, {images:,} are there; it is "
            "cut short or its .idx is incomplete: copy both again, or delete the .idx"
        )


def _read_heads(path: Path, offsets: np.ndarray) -> _Heads:
    """The frames and headers of the records at some offsets, read in blocks."""
    size = path.stat().st_size
    beyond = np.flatnonzero(offsets + FRAME > size)
    if len(beyond):
        raise damaged(path, int(offsets[beyond[0]]), f"a record should be here, of {size:,} bytes")
    flags, labels, rests, sizes = [], [], [], []
    progress = ProgressLine("read headers", float(len(offsets)), "records")
    with path.open("rb") as stream:
        bytes_of = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        for start in range(0, len(offsets), _BLOCK):
            block = offsets[start : start + _BLOCK]
            # The last record may be shorter than a head; its missing bytes repeat the last one.
            places = np.minimum(block[:, None] + np.arange(_HEAD), size - 1)
            heads = _block_heads(stream.fileno(), path, block, bytes_of[places], size)
            flags.append(heads.flag)
            labels.append(heads.labels)
            rests.append(heads.rest)
            sizes.append(heads.size)
            progress.advance(float(len(block)))
    progress.finish()
    if not flags:
        raise UsageError(f"{path}: holds no record; copy it again")
    return _Heads(*(np.concatenate(parts) for parts in (flags, labels, rests, sizes)))


def _block_heads(
    descriptor: int,
    path: Path,
    offsets: np.ndarray,
    content: UInt8[np.ndarray, "n head"],
    size: int,
) -> _Heads:
    """`_Heads` of some records from their first bytes; those of several parts are read whole."""
    words = np.ascontiguousarray(content).view("<u4")
    wrong = np.flatnonzero(words[:, 0] != MAGIC)
    if len(wrong):
        place = int(wrong[0])
        raise damaged(
            path,
            int(offsets[place]),
            f"found {int(words[place, 0]):08x}, expected a record's {MAGIC:08x}",
        )
    parts, lengths = words[:, 1] >> LENGTH_BITS, (words[:, 1] & LONGEST).astype(np.int64)
    flag = words[:, 2].copy()
    floats = words[:, [3, 8, 9]].view("<f4")
    whole = FRAME + lengths
    for place in np.flatnonzero(parts).tolist():
        data, end = read_record(descriptor, int(offsets[place]), path)
        values, _ = unpack(data, path, int(offsets[place]))
        flag[place] = struct.unpack_from("<I", data)[0]
        floats[place] = [values[0], *(*values, 0.0)[:2]]
        lengths[place], whole[place] = len(data), end - offsets[place]
    rest = lengths - HEADER - 4 * flag.astype(np.int64)
    short = np.flatnonzero((rest < 0) | (offsets + whole > size))
    if len(short):
        place = int(short[0])
        raise damaged(
            path, int(offsets[place]), f"a record of {lengths[place]:,} bytes is cut short"
        )
    # The label stands in the header where there are no others, and behind it where there are.
    labels = np.where(flag[:, None] > 0, floats[:, 1:], floats[:, [0, 0]])
    return _Heads(flag, labels.astype(np.float32), rest, whole)
