"""CIFAR's official binary archives: which of the two it is, their members, their records.

A record is one label byte (CIFAR-100: coarse, then fine), then 3072 bytes of a 32 x 32 picture: all
of red, all of green, all of blue, each row by row. Members are read from the tar by their last name
and never written to disk. The archives' python version holds pickles, which can run code when they
are read, and is refused.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8

from dist_dml.errors import UsageError

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE
_MAX_BYTES = 2**29
"""Of one member; the largest official one has 154 MB. A small archive can hold a huge one."""


@dataclass(frozen=True, eq=False)
class Layout:
    """What one of the two archives holds.

    Attributes:
        kind: `source.kind` of the pack.
        archive: official name of the archive.
        folder: its one folder.
        splits: files of records by split, each with its official number of images.
        label_bytes: bytes in front of the pixels; the last one is the class.
        names: file of the class names, a line each.
        coarse_names: file of the superclass names; empty where there are none.
        num_classes: official number of classes.
    """

    kind: str
    archive: str
    folder: str
    splits: Mapping[str, Mapping[str, int]]
    label_bytes: int
    names: str
    coarse_names: str
    num_classes: int

    @property
    def members(self) -> tuple[str, ...]:
        """Every file that is read."""
        records = [name for files in self.splits.values() for name in files]
        return tuple(filter(None, [self.names, self.coarse_names, *records]))


CIFAR10 = Layout(
    kind="cifar10",
    archive="cifar-10-binary.tar.gz",
    folder="cifar-10-batches-bin",
    splits={
        "train": {f"data_batch_{number}.bin": 10_000 for number in range(1, 6)},
        "seen": {"test_batch.bin": 10_000},
    },
    label_bytes=1,
    names="batches.meta.txt",
    coarse_names="",
    num_classes=10,
)
CIFAR100 = Layout(
    kind="cifar100",
    archive="cifar-100-binary.tar.gz",
    folder="cifar-100-binary",
    splits={"train": {"train.bin": 50_000}, "seen": {"test.bin": 10_000}},
    label_bytes=2,
    names="fine_label_names.txt",
    coarse_names="coarse_label_names.txt",
    num_classes=100,
)
_LAYOUTS = (CIFAR10, CIFAR100)
_WHERE = f"get {CIFAR10.archive} or {CIFAR100.archive} from {PAGE}"


@dataclass(frozen=True)
class CifarRecord:
    """One image: its WebDataset key, its class, its superclass ("" in CIFAR-10), its record."""

    key: str
    label: str
    coarse: str
    file: str
    record: int
    pixels: bytes


def picture_of(pixels: bytes) -> UInt8[np.ndarray, "32 32 3"]:
    """The RGB image of a record's 3072 bytes."""
    return np.frombuffer(pixels, np.uint8).reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)


def read_archive(path: Path) -> tuple[Layout, dict[str, bytes]]:
    """Which of the two it is, and the bytes of every member that is needed, by file name.

    Args:
        path: a tar, compressed or not, or the folder that it was extracted to.

    Raises:
        UsageError: it cannot be read, is another version, holds both, or misses a member.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file; {_WHERE}")
    content: dict[str, bytes] = {}
    others: list[str] = []
    for name, data in _folder_files(path) if path.is_dir() else _tar_files(path):
        if data is None:
            others.append(name)
        elif name in content:
            raise UsageError(
                f"{path}: holds two files {name}; give one archive or one extracted folder"
            )
        else:
            content[name] = data
    found = {layout: sum(name in content for name in layout.members) for layout in _LAYOUTS}
    if all(found.values()):
        raise UsageError(f"{path}: holds CIFAR-10 and CIFAR-100; give the archive or folder of one")
    layout = max(_LAYOUTS, key=lambda one: found[one])
    missing = [name for name in layout.members if name not in content]
    if missing and found[layout]:
        raise UsageError(
            f"{path}: {layout.kind} without {missing[0]} ({len(missing)} of "
            f"{len(layout.members)} files are missing); get {layout.archive} from {PAGE} again"
        )
    if missing:
        raise UsageError(f"{path}: {_other_version(others)}; {_WHERE}")
    return layout, content


def _other_version(names: Sequence[str]) -> str:
    """What an archive without binary members is."""
    stems = {PurePosixPath(name).name for name in names}
    if any(name.endswith(".mat") for name in stems):
        return "this is the Matlab version of CIFAR, expected the binary one"
    if "data_batch_1" in stems or {"train", "test", "meta"} <= stems:
        return (
            "this is the python version of CIFAR, whose pickles are never opened, expected the "
            "binary one"
        )
    return "holds no file of CIFAR's binary version (data_batch_1.bin or train.bin)"


_MEMBERS = frozenset(name for layout in _LAYOUTS for name in layout.members)


def _folder_files(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of the wanted files of a folder or its official subfolders, None of others."""
    folders = [path, *(path / layout.folder for layout in _LAYOUTS)]
    folders += [path / name for name in ("cifar-10-batches-py", "cifar-100-python")]
    for folder in filter(Path.is_dir, folders):
        for file in sorted(folder.iterdir()):
            if file.is_file():
                yield file.name, file.read_bytes() if file.name in _MEMBERS else None


def _tar_files(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """The same of a tar, compressed or not, in one pass."""
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                if not member.isreg():
                    continue
                name = PurePosixPath(member.name).name
                if name in _MEMBERS and member.size > _MAX_BYTES:
                    raise UsageError(
                        f"{path}: {name} has {member.size:,} bytes, expected at most "
                        f"{_MAX_BYTES:,}; {_WHERE}"
                    )
                stream = tar.extractfile(member) if name in _MEMBERS else None
                yield name, stream.read() if stream is not None else None
            # To the very end, where gzip keeps the checksum: nothing else would find a wrong bit.
            while tar.fileobj is not None and tar.fileobj.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{path}: no readable tar ({reason}); it is damaged or something else, {_WHERE}"
        ) from None


def records_of(
    path: Path, layout: Layout, content: Mapping[str, bytes]
) -> dict[str, list[CifarRecord]]:
    """The records of each split, in the order of the files. Other counts than official are noted.

    Args:
        path: of the archive, for messages.
        layout: which of the two it is.
        content: the bytes of its members.

    Raises:
        UsageError: a file is cut short, or has a label without a name.
    """
    names = _names(path, layout.names, content, layout.num_classes)
    coarse = _names(path, layout.coarse_names, content, 20) if layout.coarse_names else []
    splits: dict[str, list[CifarRecord]] = {}
    for split, files in layout.splits.items():
        splits[split] = []
        for file, expected in files.items():
            found = _records(path, file, content[file], layout.label_bytes, names, coarse)
            splits[split] += found
            if len(found) != expected:
                print(f"note: {file} holds {len(found):,} images, the official one {expected:,}")
    return splits


def _names(path: Path, file: str, content: Mapping[str, bytes], expected: int) -> list[str]:
    """The names in a file, by label."""
    try:
        lines = content[file].decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise UsageError(f"{path}: {file} is not UTF-8 text; {_WHERE}") from None
    names = [line.strip() for line in lines]
    while names and not names[-1]:  # The official files end with blank lines.
        names.pop()
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(
            f"{path}: {file} has an empty line or a name twice among {len(names)}; {_WHERE}"
        )
    if len(names) != expected:
        print(f"note: {file} holds {len(names)} names, the official one {expected}")
    return names


def _records(
    path: Path,
    file: str,
    data: bytes,
    label_bytes: int,
    names: Sequence[str],
    coarse: Sequence[str],
) -> list[CifarRecord]:
    """The records of one file; the class is the byte in front of the pixels."""
    length = label_bytes + _PIXEL_BYTES
    if len(data) % length or not data:
        raise UsageError(
            f"{path}: {file} has {len(data):,} bytes, expected a multiple of its records' "
            f"{length:,}; it is cut short, get the archive again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, length)
    for column, limit in enumerate([len(coarse), len(names)][-label_bytes:]):
        outside = np.flatnonzero(records[:, column] >= limit)
        if len(outside):
            raise UsageError(
                f"{path}: {file}: record {outside[0]} has label {records[outside[0], column]}, "
                f"expected 0..{limit - 1}; the file is damaged, get the archive again"
            )
    stem = file.removesuffix(".bin")
    return [
        CifarRecord(
            key=f"{stem}/{number:05d}",
            label=names[int(record[label_bytes - 1])],
            coarse=coarse[int(record[0])] if label_bytes == 2 else "",
            file=file,
            record=number,
            pixels=record[label_bytes:].tobytes(),
        )
        for number, record in enumerate(records)
    ]
