"""`dist-dml pack recordio`: MXNet RecordIO of faces (MS1M, Glint360K, WebFace) or of im2rec.

    SRC/train.rec, SRC/train.idx, SRC/property        property: "num_classes,height,width"

The `.bin` files of insightface's verification sets are pickles and are never opened.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dist_dml.data.index import Index
from dist_dml.data.index_command import describe
from dist_dml.data.pack.columns import (
    add_common_arguments,
    file_hash,
    image_extension,
    shuffled_shards,
)
from dist_dml.data.pack.division import add_division_arguments, check_counts, divide
from dist_dml.data.pack.image_files import encoders, shrink
from dist_dml.data.pack.listed_images import note
from dist_dml.data.pack.recordio_images import ImageRecords, read_images
from dist_dml.data.pack.recordio_reader import (
    damaged,
    read_idx,
    read_record,
    scan_offsets,
    unpack,
)
from dist_dml.data.pack.writing import ShardPlan, write_shards
from dist_dml.errors import UsageError

VERSION = 1
LAYOUT = "train.rec, train.idx and property (num_classes,height,width)"
_ROW = np.dtype([("key", "<i8"), ("offset", "<i8"), ("label", "<i4")])
_TAR_BYTES_PER_SAMPLE = 2560
PUBLISHED = {
    10_572: ("CASIA-WebFace", 490_623),
    85_742: ("MS1MV2", 5_822_653),
    93_431: ("MS1MV3", 5_179_510),
    205_990: ("WebFace4M", 4_235_242),
    360_232: ("Glint360K", 17_091_657),
    617_970: ("WebFace12M", 12_720_066),
    2_059_906: ("WebFace42M", 42_474_557),
}
"""Name and images of the known sets, by their number of classes (insightface's configurations)."""


def pack_recordio(
    src: str | Path,
    out: str | Path,
    seed: int = 0,
    test_fraction: float = 0.0,
    seen_per_class: int = 0,
    resize: int = 0,
    shard_samples: int = 10_000,
    processes: int = 0,
    strict_counts: bool = False,
) -> Index:
    """Pack the images of a `.rec`; a class is a label, a key the number of its record.

    Everything is `train` unless a share of the classes, or images of each, are held out. The label
    of every record is read first: the whole file passes once. Takes about 200 bytes a record of
    memory, and 2 s a million without the disk (2026-11).

    Args:
        src: the folder, or a `.rec` with its `.idx` beside it. Without a `.idx` it is scanned.
        out: data set folder.
        seed: of division and order.
        test_fraction: share of the classes that are never trained on.
        seen_per_class: held-out images of a training class, at most a quarter of it.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.
        strict_counts: refuse other counts than `property` and the published ones.

    Raises:
        UsageError: a file is missing, a pickle, or damaged; names the byte.
        RunError: an image cannot be decoded where it is resized.
    """
    rec = _find(Path(src))
    idx, prop = rec.with_suffix(".idx"), rec.with_name("property")
    images = _images(rec, idx)
    labels, classes = np.unique(images.label, return_inverse=True)
    shape = _check(rec, prop, images, labels, strict_counts)
    rows = np.empty(len(images.key), _ROW)
    rows["key"], rows["offset"], rows["label"] = images.key, images.offset, images.label
    named = np.argsort(np.argsort(labels.astype(str)))  # `pack folder` numbers by the names' order.
    divided = divide(named[classes], len(labels), seed, test_fraction, seen_per_class, str(rec))
    splits = {name: rows[chosen] for name, chosen in divided.items()}
    source = {
        "kind": "recordio",
        "version": VERSION,
        "name": rec.resolve().parent.name,
        "seed": seed,
        "test_fraction": test_fraction,
        "seen_per_class": seen_per_class,
        "resize": resize,
        "shard_samples": shard_samples,
        "property": shape,
        "files": {rec.name: rec.stat().st_size}
        | {path.name: file_hash(path) for path in (idx, prop) if path.is_file()},
    }
    shards = shuffled_shards(splits, seed, shard_samples)
    size = int(images.size.sum()) + _TAR_BYTES_PER_SAMPLE * len(rows)
    render = partial(_render, rec, resize)
    return write_shards(Path(out), shards, render, source, encoders(resize), size, processes)


def _find(src: Path) -> Path:
    """The `.rec` that is meant.

    Raises:
        UsageError: there is none, or a verification set was given.
    """
    if src.suffix == ".bin":
        raise UsageError(
            f"{src}: verification sets (.bin) are pickles, which can run code when they are read, "
            "and are never opened; pack the images they were made of with `dist-dml pack folder`"
        )
    rec = src / "train.rec" if src.is_dir() else src
    if not rec.is_file() or rec.suffix != ".rec":
        raise UsageError(f"{rec}: no such .rec file; expected a folder with {LAYOUT}, or a .rec")
    pickles = sorted(path.name for path in rec.parent.glob("*.bin"))
    if pickles:
        note(f"{', '.join(pickles[:4])}: left out, verification sets (.bin) are pickles")
    return rec


def _images(rec: Path, idx: Path) -> ImageRecords:
    """The image records by the `.idx`, or by a scan where there is none."""
    if idx.is_file() and idx.stat().st_size:
        keys, offsets = read_idx(idx)
    else:
        note(f"{idx}: no such file, so {rec.name} is scanned")
        offsets = scan_offsets(rec)
        keys = np.arange(len(offsets), dtype=np.int64)
    images = read_images(rec, keys, offsets)
    if not len(images.key):
        raise UsageError(f"{rec}: holds no image; copy it again")
    return images


def _check(
    rec: Path, prop: Path, images: ImageRecords, labels: np.ndarray, strict: bool
) -> list[int]:
    """What `property` says, compared with what was found and what is published.

    Raises:
        UsageError: it is not three numbers, or (strict) counts differ.
    """
    found = {"images": len(images.key), "classes": len(labels)}
    if int(labels[-1]) != len(labels) - 1:
        note(f"{rec}: labels are not 0..{len(labels) - 1:,}; classes are numbered by their order")
    stated: list[int] = []
    if prop.is_file():
        text = prop.read_bytes()[:200].decode("ascii", "replace").strip()
        parts = text.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise UsageError(f"{prop}: is {text[:60]!r}, expected num_classes,height,width")
        stated = [int(part) for part in parts]
        check_counts(found, {"classes": stated[0]}, strict, str(prop))
    name, number = PUBLISHED.get(stated[0] if stated else len(labels), ("", 0))
    if name:
        check_counts(found, {"images": number}, strict, f"{rec} ({name})")
    return stated


def _render(rec: Path, resize: int, shard: ShardPlan) -> Iterator[dict[str, str | bytes]]:
    """The samples of one shard."""
    with rec.open("rb", buffering=0) as stream:
        for key, offset, label in np.asarray(shard.samples).tolist():
            data, _ = read_record(stream.fileno(), offset, rec)
            _, image = unpack(data, rec, offset)
            extension = image_extension(image)
            if not extension:
                raise damaged(rec, offset, f"record {key} holds no JPEG, PNG or WebP image")
            if resize:
                image, extension, *_ = shrink(image, extension, resize, f"{rec}: record {key}")
            yield {"__key__": f"{key:08d}", extension: image, "cls": b"%d" % label}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack recordio`."""
    parser.add_argument("src", help=f"folder with {LAYOUT}, or a .rec file")
    parser.add_argument("out", help="folder of the new data set")
    add_division_arguments(parser, test_fraction=0.0, seen_per_class=0)
    parser.add_argument(
        "--strict-counts", action="store_true", help="refuse other counts than the published ones"
    )
    add_common_arguments(parser)
    parser.set_defaults(shard_samples=10_000)


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack recordio`. Returns the exit code."""
    index = pack_recordio(
        arguments.src,
        arguments.out,
        arguments.seed,
        arguments.test_fraction,
        arguments.seen_per_class,
        arguments.resize,
        arguments.shard_samples,
        arguments.processes,
        arguments.strict_counts,
    )
    print(describe(index))
    return 0
