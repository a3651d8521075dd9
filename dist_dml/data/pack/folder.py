"""`dist-dml pack folder`: anybody's `class_name/image.jpg` tree as a data set."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from dist_dml.data.index import Index
from dist_dml.data.index_command import describe
from dist_dml.data.pack.image_files import ImageSample, Tree, encoders, render, unique_keys
from dist_dml.data.pack.writing import plan_shards, write_pack
from dist_dml.data.shards import IMAGE_EXTENSIONS
from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of

FORMAT = 1


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
    fill = partial(render, Tree(root), resize)
    return write_pack(Path(out), shards, fill, source, encoders(resize), size, processes)


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
) -> dict[str, list[ImageSample]]:
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


def _samples(prefix: str, classes: Mapping[str, Sequence[str]]) -> dict[str, list[ImageSample]]:
    """The samples of each class. Keys start with the class folder, also below train/ and test/."""
    result: dict[str, list[ImageSample]] = {}
    for label, names in classes.items():
        keys = unique_keys(f"{label}/{name}" for name in names)
        paths = ("/".join(part for part in (prefix, label, name) if part) for name in names)
        result[label] = [
            ImageSample(key, label, path) for key, path in zip(keys, paths, strict=True)
        ]
    return result


def _hold_out(
    sides: Mapping[str, Mapping[str, list[ImageSample]]], seed: int, seen_per_class: int
) -> dict[str, list[ImageSample]]:
    """Cut `seen` off the training classes and shuffle every split, so that shards mix classes."""
    splits: dict[str, list[ImageSample]] = {"train": [], "seen": [], "test": []}
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


def _listing_hash(root: Path, splits: Mapping[str, Sequence[ImageSample]]) -> str:
    """Changes when a file is added, removed, renamed or gets another size."""
    digest = hashlib.sha256()
    for path in sorted(sample.path for samples in splits.values() for sample in samples):
        digest.update(
            f"{path}\0{(root / path).stat().st_size}\n".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()[:32]


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
