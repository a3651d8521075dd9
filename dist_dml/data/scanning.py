"""The samples of a shard: where their members lie, what their labels say, and what is damaged.

Nothing in a shard is ever executed: members are found by their extension and read as bytes.
WebDataset's own `decode` unpickles some extensions, so it is not used anywhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.image_header import image_size
from dist_dml.data.labels import LabelFault, cls_label, json_label
from dist_dml.data.shards import IMAGE_EXTENSIONS, split_name
from dist_dml.data.tar_members import ForwardReader, TarDamage, TarMember, walk_members
from dist_dml.errors import UsageError

PICKLE_EXTENSIONS = frozenset(("pkl", "pickle", "pyd", "pt", "pth", "joblib"))
"""What loaders unpickle, which executes whatever the file says."""
_IMAGES = frozenset(IMAGE_EXTENSIONS)
_ACCEPTED = _IMAGES | {"cls", "json"}
_CHUNK = 1 << 20
_LONGEST_LABEL = 16 << 20
_ABSENT = (-1, -1)
COLUMNS = {
    "extension": np.int8,
    "offset": np.int64,
    "size": np.int64,
    "checksum": np.uint32,
    "width": np.int32,
    "height": np.int32,
    "cls_offset": np.int64,
    "cls_size": np.int64,
    "json_offset": np.int64,
    "json_size": np.int64,
}
"""Of a scanned shard: the image's extension, place, CRC-32 and size, the places of the labels."""


@dataclass(frozen=True)
class LeftOut:
    """One sample that cannot be used, or with an empty key a shard from `offset` on."""

    key: str
    offset: int
    reason: str
    """For counting: `no_label`, `cut_short`, `pickle`, ..."""
    message: str
    """For people, without the shard's name."""


@dataclass(frozen=True)
class ShardScan:
    """The sound samples of one shard, in columns, and the others.

    Keys and labels are pyarrow arrays of strings, which take a fifth of the memory of lists and are
    sent between processes as one block.
    """

    keys: Any
    labels: Any
    columns: dict[str, np.ndarray]
    """`COLUMNS`."""
    left_out: tuple[LeftOut, ...]


@dataclass(slots=True)
class _Found:
    """What is known of one key so far."""

    offset: int
    image: tuple[int, ...] | None = None
    """The first six of `COLUMNS`."""
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    label: str | None = None
    label_fault: LabelFault | None = None
    fault: tuple[str, str] | None = None
    """Reason and message of the first thing that is wrong."""

    def blame(self, reason: str, message: str) -> None:
        if self.fault is None:
            self.fault = reason, message


def scan_shard(
    path: Path, label_key: str = "label", labels: Mapping[str, str | None] | None = None
) -> ShardScan:
    """Scan a local tar; `scan_members` for the rest.

    Raises:
        UsageError: if there is no such file.
    """
    try:
        with path.open("rb", buffering=_CHUNK) as stream:
            reader = ForwardReader(stream, seeks=True)
            return scan_members(walk_members(reader), reader, label_key, labels)
    except FileNotFoundError:
        raise UsageError(f"shard {path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UsageError(f"shard {path}: is a folder; give a tar") from None


def scan_members(
    members: Iterable[TarMember],
    reader: ForwardReader,
    label_key: str,
    labels: Mapping[str, str | None] | None = None,
) -> ShardScan:
    """Group the members of a tar into samples, in the order of their first members.

    Reads every image once, for its checksum, in bounded memory. Members with other extensions are
    skipped unread, and so are pickles, whose samples are left out. About 20 us a sample of 2 KB
    (2026-11).

    Args:
        members: of the tar; the reader stands at the content of the one that was yielded last.
        reader: of the tar.
        label_key: key of the label in `.json` members.
        labels: labels by key, if they come from elsewhere.
    """
    found: dict[str, _Found] = {}
    damage, last = None, None
    try:
        for name, _, offset, size in members:
            split = split_name(name)
            if split is None:
                continue
            key, extension = split
            kind = extension.rpartition(".")[2]
            if extension not in _ACCEPTED and kind not in PICKLE_EXTENSIONS:
                continue
            last = found.get(key)
            if last is None:
                last = found[key] = _Found(offset)
            if extension in _IMAGES:
                _add_image(last, key, extension, offset, size, reader)
            elif kind in PICKLE_EXTENSIONS:
                last.blame(
                    "pickle",
                    f"key {key} has a .{extension} member, a pickle, which executes what it says; "
                    "it was not opened: pack the data without it",
                )
            else:
                wanted = label_key if labels is None else None
                _add_label(last, key, extension, offset, size, reader, wanted)
    except TarDamage as error:
        damage = error
        if last is not None:
            # Whether more of its members would have come, nobody knows.
            last.fault = "cut_short", f"the last whole sample may lack members: {error.reason}"
    return _finish(found, damage, labels)


def _add_image(
    sample: _Found, key: str, extension: str, offset: int, size: int, reader: ForwardReader
) -> None:
    if extension in sample.places:
        _blame_repeated(sample, key, extension)
        return
    if sample.image is not None:
        other = IMAGE_EXTENSIONS[sample.image[0]]
        sample.blame(
            "two_images", f"key {key} has two images (.{other} and .{extension}); keep one"
        )
        return
    head = reader.read(min(size, _CHUNK))
    checksum, left = zlib.crc32(head), size - len(head)
    while left > 0 and head:
        data = reader.read(min(left, _CHUNK))
        if not data:
            break
        checksum, left = zlib.crc32(data, checksum), left - len(data)
    if left > 0:
        raise TarDamage(
            f"cut short at byte {reader.position}; write or copy it again",
            "cut_short",
            reader.position,
        )
    height, width = image_size(head)
    code = IMAGE_EXTENSIONS.index(extension)
    sample.image = (code, offset, size, checksum, width, height)
    sample.places[extension] = offset, size


def _add_label(
    sample: _Found,
    key: str,
    extension: str,
    offset: int,
    size: int,
    reader: ForwardReader,
    label_key: str | None,
) -> None:
    """The text of `.cls` counts; without one, the value in `.json`. None reads neither."""
    if extension in sample.places:
        _blame_repeated(sample, key, extension)
        return
    sample.places[extension] = offset, size
    if label_key is None or (extension == "json" and "cls" in sample.places):
        return
    if size > _LONGEST_LABEL:
        sample.label_fault = LabelFault(f".{extension} has {size} bytes", "bad_label")
        return
    data = reader.read(size)
    if len(data) < size:
        raise TarDamage(
            f"cut short at byte {reader.position}; write or copy it again",
            "cut_short",
            reader.position,
        )
    sample.label, sample.label_fault = None, None
    try:
        sample.label = cls_label(data) if extension == "cls" else json_label(data, label_key)
    except LabelFault as fault:
        sample.label_fault = fault


def _blame_repeated(sample: _Found, key: str, extension: str) -> None:
    sample.blame(
        "duplicate_key",
        f"key {key} has two .{extension} members; give every sample its own key",
    )


def _finish(
    found: Mapping[str, _Found], damage: TarDamage | None, labels: Mapping[str, str | None] | None
) -> ShardScan:
    """Judge every key. The damage of the tar itself comes first: it explains the others."""
    import pyarrow

    left_out = [] if damage is None else [LeftOut("", damage.offset, damage.kind, damage.reason)]
    keys, texts, rows = [], [], []
    for key, sample in found.items():
        if labels is not None:
            sample.label, sample.label_fault = labels.get(key), None
        fault = _fault_of(key, sample)
        if fault is not None:
            shown = key.encode("utf-8", "backslashreplace").decode()
            left_out.append(LeftOut(shown, sample.offset, *fault))
            continue
        assert sample.image is not None
        keys.append(key)
        texts.append(sample.label)
        places = sample.places
        rows.append((*sample.image, *places.get("cls", _ABSENT), *places.get("json", _ABSENT)))
    values = zip(*rows, strict=True) if rows else ((),) * len(COLUMNS)
    return ShardScan(
        keys=pyarrow.array(keys, pyarrow.string()),
        labels=pyarrow.array(texts, pyarrow.string()),
        columns={
            name: np.array(column, dtype)
            for (name, dtype), column in zip(COLUMNS.items(), values, strict=True)
        },
        left_out=tuple(left_out),
    )


def _fault_of(key: str, sample: _Found) -> tuple[str, str] | None:
    """Why a sample cannot be used, or None."""
    if sample.fault is not None:
        return sample.fault
    if not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError:
            shown = key.encode("utf-8", "backslashreplace").decode()
            return "bad_name", f"key {shown} is not UTF-8; write its name as UTF-8"
    if sample.image is None:
        wanted = ", .".join(IMAGE_EXTENSIONS)
        return "no_image", f"key {key} has no image (.{wanted}); was the tar cut short?"
    if sample.label_fault is not None:
        return sample.label_fault.kind, f"key {key}: {sample.label_fault.reason}"
    if sample.label is None:
        wanted = f"add {key}.cls (or .json with the label)"
        return "no_label", f"key {key} has no label; {wanted}"
    return None
