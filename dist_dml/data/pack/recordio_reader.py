"""MXNet's RecordIO with image records, as insightface and im2rec write it. Nothing is unpickled.

    record   uint32 0xced7230a, uint32 (part << 29 | length), data, zeros up to 4 bytes
             part 0: a whole record; 1, 2, 3: first, middle and last part of one whose data held the
             magic number at a multiple of 4 bytes; it was taken out there and goes between parts
    data     <IfQQ: flag, label, id, id2; then `flag` float32 labels; then the image
    .idx     a line "key<tab>offset" a record

Sources: dmlc-core src/recordio.cc, MXNet python/mxnet/recordio.py, insightface arcface_torch.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from dist_dml.data.progress import ProgressLine
from dist_dml.errors import UsageError

MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", MAGIC)
LENGTH_BITS = 29
LONGEST = (1 << LENGTH_BITS) - 1
FRAME = 8
HEADER = 24


def damaged(path: Path, offset: int, what: str) -> UsageError:
    """The error of a damaged file, with the byte where it shows."""
    return UsageError(
        f"{path}: byte {offset:,}: {what}; the file is damaged, cut short or no RecordIO, copy it "
        "again"
    )


def read_record(descriptor: int, offset: int, path: Path) -> tuple[bytes, int]:
    """The data of the record that starts at a byte, its parts joined, and the byte behind it.

    Args:
        descriptor: of the open `.rec`.
        offset: of the record.
        path: for messages.

    Raises:
        UsageError: there is no whole record there.
    """
    data, position, first = b"", offset, True
    while True:
        frame = os.pread(descriptor, FRAME, position)
        if len(frame) < FRAME:
            raise damaged(path, position, "a record is cut short")
        magic, word = struct.unpack("<II", frame)
        part, length = word >> LENGTH_BITS, word & LONGEST
        if magic != MAGIC:
            raise damaged(path, position, f"found {magic:08x}, expected a record's {MAGIC:08x}")
        if part not in ((0, 1) if first else (2, 3)):
            raise damaged(path, position, f"part {part} of a record stands out of order")
        piece = os.pread(descriptor, length, position + FRAME)
        if len(piece) < length:
            raise damaged(path, position, f"a record of {length:,} bytes is cut short")
        data += piece if first else _MAGIC_BYTES + piece
        position += FRAME + length + -length % 4
        if part in (0, 3):
            return data, position
        first = False


def unpack(data: bytes, path: Path, offset: int) -> tuple[tuple[float, ...], bytes]:
    """The labels and the image of a record; one label where `flag` is 0.

    Args:
        data: of the record, see `read_record`.
        path: for messages.
        offset: of the record, for messages.

    Raises:
        UsageError: the record is shorter than its header says.
    """
    if len(data) >= HEADER:
        flag, label = struct.unpack_from("<If", data)
        if len(data) >= HEADER + 4 * flag:
            labels = struct.unpack_from(f"<{flag}f", data, HEADER) if flag else (label,)
            return labels, data[HEADER + 4 * flag :]
    raise damaged(path, offset, f"a record of {len(data)} bytes is shorter than its header says")


def read_idx(path: Path) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Keys and offsets of a `.idx`, by offset. A million lines take 1 s (2026-11).

    Raises:
        UsageError: it has another form, or names a key or an offset twice.
    """
    import pyarrow
    from pyarrow import csv

    types = {"key": pyarrow.int64(), "offset": pyarrow.int64()}
    try:
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(column_names=list(types)),
            parse_options=csv.ParseOptions(delimiter="\t"),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[]),
        )
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UsageError(
            f"{path}: expected lines of key, tab, byte offset ({reason}); copy it again, or delete "
            "it: the .rec is then scanned"
        ) from None
    order = np.argsort(table["offset"].to_numpy(), kind="stable")
    keys, offsets = table["key"].to_numpy()[order], table["offset"].to_numpy()[order]
    if len(np.unique(keys)) < len(keys) or (np.diff(offsets) <= 0).any() or offsets[:1].sum() < 0:
        raise UsageError(
            f"{path}: has a key or an offset twice, or one below 0; delete it: the .rec is then "
            "scanned"
        )
    return keys, offsets


def scan_offsets(path: Path) -> Int64[np.ndarray, " n"]:
    """The offset of every record, by going from one to the next: 0.9 us each in memory (2026-11).

    Raises:
        UsageError: see `read_record`.
    """
    size = path.stat().st_size
    progress = ProgressLine("scan", size / 2**20, "MiB")
    offsets, position, shown = [], 0, 0
    with path.open("rb") as stream:
        descriptor = stream.fileno()
        while position < size:
            offsets.append(position)
            frame = os.pread(descriptor, FRAME, position)
            word = struct.unpack("<II", frame) if len(frame) == FRAME else (0, 0)
            length = word[1] & LONGEST
            end = position + FRAME + length + -length % 4
            if word[0] != MAGIC or word[1] >> LENGTH_BITS or end > size:
                end = read_record(descriptor, position, path)[1]  # Several parts, or damage.
                if end > size:
                    raise damaged(path, position, "the padding of the last record is missing")
            position = end
            if position - shown > 1 << 26:
                progress.advance((position - shown) / 2**20)
                shown = position
    progress.advance((size - shown) / 2**20)
    progress.finish()
    return np.array(offsets, np.int64)
