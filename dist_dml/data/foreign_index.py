"""Indexes that other tools leave beside a tar: read, checked against the tar, and written.

A scan that starts from one refuses the shard where the two disagree, so that an index of an older
tar does not go unnoticed. The headers of the tar are read in any case: a checksum needs every byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np

from dist_dml.data.labels import LabelFault, value_label
from dist_dml.data.shards import IMAGE_EXTENSIONS, split_name
from dist_dml.data.tar_members import TarMember
from dist_dml.errors import UsageError

Foreign = Literal["dali", "energon", "img2dataset"]
_SUFFIX: dict[Foreign, str] = {"dali": ".idx", "energon": ".tar.idx", "img2dataset": ".parquet"}
_METADATA = re.compile(r"__[^/]*__($|/)")
"""What Energon takes for its own files, and leaves out."""
Walk = Generator[TarMember, None, int]


@dataclass(frozen=True)
class Checked:
    """The members of a tar, compared on the way, and labels by key if the index states them."""

    members: Iterable[TarMember]
    labels: Mapping[str, str | None] | None


def foreign_path(shard: str, kind: Foreign) -> Path:
    """Where a tool puts its index of a tar: `a.idx`, `a.tar.idx`, `a.parquet` beside `a.tar`."""
    path = Path(shard)
    return path.with_name(path.name.removesuffix(".tar") + _SUFFIX[kind])


def from_dali(shard: str, members: Walk, label_key: str) -> Checked:
    """The index of NVIDIA DALI's `wds2idx`, versions 1.1 and 1.2.

    A line `v1.2 SAMPLES`, then a line a sample: extension, first byte, size and name of each of its
    members. Version 1.1 has no names.

    Raises:
        UsageError: it is damaged; on the way, that it disagrees with the tar.
    """
    path = foreign_path(shard, "dali")
    listed = _dali_members(path)

    def compare() -> Iterator[TarMember]:
        whole = (member for member in members if split_name(member.name) is not None)
        for member, (offset, size, name) in zip_longest(whole, listed, fillvalue=(-1, -1, "")):
            if not isinstance(member, TarMember):
                raise _disagrees(path, shard, offset, "lists a member where the tar has none")
            if (member.offset, member.size) != (offset, size) or name not in ("", member.name):
                wanted = f"the tar has {member.name} of {member.size} bytes"
                raise _disagrees(path, shard, member.offset, wanted)
            yield member

    return Checked(compare(), None)


def _dali_members(path: Path) -> list[tuple[int, int, str]]:
    """Offset, size and name of every member, in the order of the file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        version, count = lines[0].split()
        width = {"v1.1": 3, "v1.2": 4}[version]
        rows = [line.split() for line in lines[1:] if line.strip()]
        if len(rows) != int(count) or any(not row or len(row) % width for row in rows):
            raise ValueError
        found = []
        for row in rows:
            for i in range(0, len(row), width):
                name = row[i + 3] if width == 4 else ""
                # `wds2idx` also lists files without an extension, which are no samples.
                if not name or split_name(name) is not None:
                    found.append((int(row[i + 1]), int(row[i + 2]), name))
        return found
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, IndexError):
        raise UsageError(
            f"{path}: is no whole index of DALI's wds2idx (version 1.1 or 1.2); make it again or "
            "leave out --from dali"
        ) from None


def from_energon(shard: str, members: Walk, label_key: str) -> Checked:
    """The index of Megatron-Energon: little-endian uint64, the first header of each sample.

    The last number is the end of the last member.

    Raises:
        UsageError: it is damaged; on the way, that it disagrees with the tar.
    """
    path = foreign_path(shard, "energon")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if not data or len(data) % 8:
        raise UsageError(
            f"{path}: has {len(data)} bytes, expected 8 a sample and 8 more; make it again or "
            "leave out --from energon"
        )
    listed = np.frombuffer(data, "<u8").tolist()

    def compare() -> Iterator[TarMember]:
        key, row, end = "", 0, 0
        while True:
            try:
                member = next(members)
            except StopIteration as stop:
                end = stop.value
                break
            split = split_name(member.name)
            if split is not None and split[0] != key and not _METADATA.match(member.name):
                key = split[0]
                if row >= len(listed) or listed[row] != member.start:
                    wanted = f"the tar's sample {row} is {key}"
                    raise _disagrees(path, shard, member.start, wanted)
                row += 1
            yield member
        if listed[row:] != [end]:
            raise _disagrees(path, shard, end, f"the tar ends after {row} samples")

    return Checked(compare(), None)


def from_img2dataset(shard: str, members: Walk, label_key: str) -> Checked:
    """The table that img2dataset writes beside a tar: labels by key, from the column `label_key`.

    Only rows of status `success` are in the tar.

    Raises:
        UsageError: it is damaged or has no such column; on the way, that the keys differ.
    """
    import pyarrow
    import pyarrow.parquet

    path = foreign_path(shard, "img2dataset")
    try:
        names = pyarrow.parquet.read_schema(path).names
        for name in ("key", "status", label_key):
            if name not in names:
                hint = "name it with --label-key" if name == label_key else "img2dataset writes one"
                found = ", ".join(names[:12])
                raise UsageError(f"{path}: has no column {name!r} (it has: {found}); {hint}")
        table = pyarrow.parquet.read_table(path, columns=["key", "status", label_key])
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: cannot be read ({reason}); leave out --from") from None
    rows = zip(*(table[name].to_pylist() for name in ("key", "status", label_key)), strict=True)
    labels: dict[str, str | None] = {}
    for key, status, value in rows:
        if status != "success":
            continue
        if str(key) in labels:
            raise UsageError(f"{path}: has key {key} twice; make it again or leave out --from")
        try:
            text = None if value is None else value_label(value, f"column {label_key!r}")
        except LabelFault as fault:
            raise UsageError(f"{path}: key {key}: {fault.reason}") from None
        labels[str(key)] = text or None

    def compare() -> Iterator[TarMember]:
        left = set(labels)
        for member in members:
            split = split_name(member.name)
            if split is not None and split[1] in IMAGE_EXTENSIONS:
                if split[0] not in labels:
                    wanted = f"it has no key {split[0]} of status success"
                    raise _disagrees(path, shard, member.offset, wanted)
                left.discard(split[0])
            yield member
        if left:
            raise UsageError(
                f"{path}: lists key {min(left)}, which shard {shard} does not have; make it again "
                "or leave out --from"
            )

    return Checked(compare(), labels)


FOREIGN: dict[Foreign, Callable[[str, Walk, str], Checked]] = {
    "dali": from_dali,
    "energon": from_energon,
    "img2dataset": from_img2dataset,
}


def _disagrees(path: Path, shard: str, offset: int, what: str) -> UsageError:
    return UsageError(
        f"{path}: disagrees with shard {shard} at byte {offset}: {what}; make it again or leave "
        "out --from"
    )
