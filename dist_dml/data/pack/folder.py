"""`dist-dml pack folder`: anybody's `class_name/image.jpg` tree as a data set."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dist_dml.data.index import Index
from dist_dml.data.index_command import describe
from dist_dml.data.pack.writing import plan_shards, write_pack
from dist_dml.data.shards import IMAGE_EXTENSIONS
from dist_dml.errors import RunError, UsageError
from dist_dml.keyed_random import generator, key_of

FORMAT = 1
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class FolderSample:
    """One image file: its WebDataset key, its class, and its path below the source folder."""

    key: str
    label: str
    path: str


def pack_folder(
    src: str | Path,
    out: str | Path,
    seed: int = 0,
    test_fraction: float = 0.5,
    seen_per_class: int = 2,
    resize: int = 0,
    shard_samples: int = 2048,
    processes: int = 0,
) -> Index:
    """Pack a tree of class folders; no class is in both `train` and `test`.

    A tree that holds just `train/` and `test/` (each with class folders) keeps that division.
    Otherwise a seeded draw of `test_fraction` of the classes is `test`. Of each training class up
    to `seen_per_class` images, at most a quarter, are held out as `seen`.

    Args:
        src: the tree; images are the direct children of class folders.
        out: data set folder.
        seed: of the division and of the order of the samples.
        test_fraction: share of the classes that are never trained on.
        seen_per_class: held-out images of a training class.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.

    Raises:
        UsageError: the tree is missing or holds no class with an image, or a side gets no class.
        RunError: an image that should be resized cannot be decoded.
    """
    root = Path(src)
    splits = _divide(root, seed, test_fraction, seen_per_class)
    source = {
        "kind": "folder",
        "version": FORMAT,
        "name": root.resolve().name,
        "seed": seed,
        "test_fraction": test_fraction,
        "seen_per_class": seen_per_class,
        "resize": resize,
        "shard_samples": shard_samples,
        "files": _listing_hash(root, splits),
    }
    shards = [
        shard
        for split, samples in splits.items()
        for shard in plan_shards(split, samples, shard_samples)
    ]
    size = sum((root / s.path).stat().st_size for samples in splits.values() for s in samples)
    import cv2

    made_with = {"opencv": cv2.__version__} if resize else {}
    render = partial(_render, root, resize)
    return write_pack(Path(out), shards, render, source, made_with, size, processes)


def _classes(root: Path) -> dict[str, list[str]]:
    """Image files by class folder, both sorted; folders without images and hidden ones left out."""
    found = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        names = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_file()
            and not entry.name.startswith(".")
            and entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
        )
        if names:
            found[folder.name] = names
    return found


def _divide(
    root: Path, seed: int, test_fraction: float, seen_per_class: int
) -> dict[str, list[FolderSample]]:
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; give a tree of class_name/image.jpg")
    folders = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if folders == {"train", "test"}:
        sides = {name: _samples(name, _classes(root / name)) for name in ("train", "test")}
        both = sorted(set(sides["train"]) & set(sides["test"]))
        if both:
            raise UsageError(
                f"{root}: class {both[0]!r} is in train/ and in test/ ({len(both)} such classes); "
                "put each class on one side, or all class folders side by side"
            )
    else:
        classes = _samples("", _classes(root))
        names = list(classes)
        order = generator(key_of(seed, "pack classes")).permutation(len(names))
        test = {names[i] for i in order[: round(test_fraction * len(names))]}
        sides = {
            "train": {name: classes[name] for name in names if name not in test},
            "test": {name: classes[name] for name in names if name in test},
        }
    counts = {name: len(side) for name, side in sides.items()}
    if not sum(counts.values()):
        kinds = ", .".join(IMAGE_EXTENSIONS)
        raise UsageError(f"{root}: found no class_name/image (.{kinds}); nothing to pack")
    wanted = {"train": test_fraction < 1, "test": test_fraction > 0}
    for name, count in counts.items():
        if wanted[name] and not count:
            raise UsageError(
                f"{root}: {sum(counts.values())} classes leave none for {name}; "
                f"add classes or change --test-fraction={test_fraction}"
            )
    return _hold_out(sides, seed, seen_per_class)


def _samples(prefix: str, classes: Mapping[str, Sequence[str]]) -> dict[str, list[FolderSample]]:
    """Give every file a key of its own: WebDataset ends a key at the first dot of the file name."""
    result: dict[str, list[FolderSample]] = {}
    for label, names in classes.items():
        taken: set[str] = set()
        result[label] = []
        for name in names:
            stem = name.rpartition(".")[0].replace(".", "_")
            key, number = f"{label}/{stem}", 2
            while key in taken:
                key, number = f"{label}/{stem}-{number}", number + 1
            taken.add(key)
            path = "/".join(part for part in (prefix, label, name) if part)
            result[label].append(FolderSample(key, label, path))
    return result


def _hold_out(
    sides: Mapping[str, Mapping[str, list[FolderSample]]], seed: int, seen_per_class: int
) -> dict[str, list[FolderSample]]:
    """Cut `seen` off the training classes and shuffle every split, so that shards mix classes."""
    splits: dict[str, list[FolderSample]] = {"train": [], "seen": [], "test": []}
    random = generator(key_of(seed, "pack seen"))
    for samples in sides["train"].values():
        count = min(seen_per_class, len(samples) // 4)
        seen = set(random.permutation(len(samples))[:count].tolist())
        for number, sample in enumerate(samples):
            splits["seen" if number in seen else "train"].append(sample)
    splits["test"] = [sample for samples in sides["test"].values() for sample in samples]
    for name, samples in splits.items():
        order = generator(key_of(seed, "pack order " + name)).permutation(len(samples))
        splits[name] = [samples[i] for i in order]
    return splits


def _listing_hash(root: Path, splits: Mapping[str, Sequence[FolderSample]]) -> str:
    """Changes when a file is added, removed, renamed or gets another size."""
    digest = hashlib.sha256()
    for path in sorted(sample.path for samples in splits.values() for sample in samples):
        digest.update(
            f"{path}\0{(root / path).stat().st_size}\n".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()[:32]


def _render(root: Path, resize: int, sample: FolderSample) -> dict[str, str | bytes]:
    data = (root / sample.path).read_bytes()
    extension = sample.path.rpartition(".")[2].lower()
    if resize:
        data, extension = _shrink(data, extension, resize, root / sample.path)
    return {
        "__key__": sample.key,
        extension: data,
        "cls": sample.label.encode(),
        "json": json.dumps({"label": sample.label, "file": sample.path}).encode(),
    }


def _shrink(data: bytes, extension: str, resize: int, path: Path) -> tuple[bytes, str]:
    """The image with a short side of `resize`: PNG stays lossless, others become JPEG."""
    import cv2
    import simplejpeg

    from dist_dml.data.reader import BadSample, decode

    try:
        image = decode(data, channels=3)
    except BadSample as error:
        raise RunError(f"{path}: {error}; repair or remove it") from None
    height, width = image.shape[:2]
    if min(height, width) <= resize:
        return data, extension
    scale = resize / min(height, width)
    size = (max(resize, round(width * scale)), max(resize, round(height * scale)))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if extension == "png":
        return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes(), "png"
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(image), _JPEG_QUALITY, "RGB", "444")
    return encoded, "jpg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack folder`."""
    parser.add_argument("src", help="tree of class_name/image.jpg")
    parser.add_argument("out", help="folder of the new data set")
    parser.add_argument("--seed", type=int, default=0, help="of division and order")
    parser.add_argument("--test-fraction", type=float, default=0.5, help="share of unseen classes")
    parser.add_argument("--seen-per-class", type=int, default=2, help="held-out training images")
    parser.add_argument("--resize", type=int, default=0, help="short side in pixels; 0 copies")
    parser.add_argument("--shard-samples", type=int, default=2048, help="images of a shard")
    parser.add_argument("--processes", type=int, default=0, help="writing processes; 0: all cores")


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack folder`. Returns the exit code."""
    if not 0 <= arguments.test_fraction <= 1:
        raise UsageError(f"--test-fraction={arguments.test_fraction}: expected a share in 0..1")
    index = pack_folder(
        arguments.src,
        arguments.out,
        arguments.seed,
        arguments.test_fraction,
        arguments.seen_per_class,
        arguments.resize,
        arguments.shard_samples,
        arguments.processes,
    )
    print(describe(index))
    return 0
