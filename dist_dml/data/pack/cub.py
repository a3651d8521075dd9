"""`dist-dml pack cub`: CUB-200-2011, 200 species of birds, from its official layout.

The split is that of metric learning: the first 100 classes train, the last 100 test. The data set's
own `train_test_split.txt` divides every class and is not used.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from dist_dml.data.index import Index
from dist_dml.data.pack.image_files import ImageSample, Tree, find_tree, unique_keys
from dist_dml.data.pack.listed_images import (
    PackOptions,
    Published,
    add_pack_arguments,
    note,
    pack_listed,
    run_packer,
)
from dist_dml.data.pack.official_lists import four_numbers, read_table, whole_number
from dist_dml.errors import UsageError

PUBLISHED = Published(
    kind="cub",
    version=1,
    title="CUB-200-2011",
    counts={"train": (5_864, 100), "test": (5_924, 100)},
)
LAST_TRAINING_CLASS = 100
_IMAGES, _LABELS, _CLASSES = "images.txt", "image_class_labels.txt", "classes.txt"
_BOXES = "bounding_boxes.txt"
_LAYOUT = (
    f"CUB_200_2011/ with {_IMAGES}, {_LABELS}, {_CLASSES} and images/001.Black_footed_Albatross/"
)


def pack_cub(
    src: str | Path,
    out: str | Path,
    seed: int = 0,
    resize: int = 0,
    shard_samples: int = 2048,
    processes: int = 0,
    strict_counts: bool = False,
    skip_missing: bool = False,
) -> Index:
    """Pack CUB-200-2011: `train` is class 1..100, `test` 101..200.

    A class has its official name, which starts with its number. The `.json` has `image_id`,
    `class_id` and, if `bounding_boxes.txt` is there, `box`.

    Args:
        src: the folder `CUB_200_2011`, the one it lies in, or a zip of it.
        out: data set folder.
        seed: of the order of the samples.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.
        strict_counts: refuse other counts than the published ones instead of noting them.
        skip_missing: leave images out that are listed and not there.

    Raises:
        UsageError: another layout, a missing file, a damaged list, or see `pack_listed`.
        RunError: an image cannot be read, or not decoded where it is resized.
    """
    options = PackOptions(seed, resize, shard_samples, processes, strict_counts, skip_missing)
    tree = find_tree(Path(src), (_IMAGES, _LABELS, _CLASSES), _LAYOUT)
    return pack_listed(Path(out), tree.below("images"), PUBLISHED, _splits(tree), options)


def _splits(tree: Tree) -> dict[str, list[ImageSample]]:
    """The samples by split, in the order of `images.txt`."""
    names = _numbered(tree, _CLASSES, "class_id name")
    labels = _numbered(tree, _LABELS, "image_id class_id")
    boxes = _boxes(tree)
    images = _numbered(tree, _IMAGES, "image_id path")
    keys = unique_keys(path for _, path in images.values())
    splits: dict[str, list[ImageSample]] = {"train": [], "test": []}
    for key, (image_id, (where, path)) in zip(keys, images.items(), strict=True):
        if image_id not in labels:
            raise UsageError(f"{where}: image {image_id} has no class in {_LABELS}; correct it")
        class_id = whole_number(labels[image_id][1], labels[image_id][0])
        if class_id not in names:
            raise UsageError(
                f"{labels[image_id][0]}: class {class_id} has no name in {_CLASSES}; correct it"
            )
        name = names[class_id][1]
        if path.split("/")[0] != name:
            # A shifted list of classes would mix the classes of train and test without a word.
            raise UsageError(
                f"{where}: {path} is not in the folder of its class {class_id}, {name}; the lists "
                "are not of one data set, get the official archive"
            )
        label = name if name.startswith(f"{class_id:03d}.") else f"{class_id:03d}.{name}"
        split = "train" if class_id <= LAST_TRAINING_CLASS else "test"
        facts = {"image_id": image_id, "class_id": class_id}
        splits[split].append(ImageSample(key, label, path, facts, boxes.get(image_id)))
    return splits


def _numbered(tree: Tree, name: str, columns: str) -> dict[int, tuple[str, str]]:
    """A table of two columns: by the number in the first, where the row stands and the second."""
    found: dict[int, tuple[str, str]] = {}
    for where, (number, text) in read_table(tree, name, columns):
        if whole_number(number, where) in found:
            raise UsageError(f"{where}: {columns.split()[0]} {number} comes twice; correct it")
        found[int(number)] = where, text
    return found


def _boxes(tree: Tree) -> Mapping[int, tuple[float, float, float, float]]:
    """The bounding box of each image, by image id; metadata that training does not need."""
    if tree.size(_BOXES) < 0:
        note(f"{tree.where(_BOXES)}: no such file, so the samples have no box")
        return {}
    table = read_table(tree, _BOXES, "image_id x y width height")
    return {whole_number(row[0], where): four_numbers(row[1:], where) for where, row in table}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack cub`."""
    add_pack_arguments(parser, f"{_LAYOUT}, the folder it lies in, or a zip of it")


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack cub`. Returns the exit code."""
    return run_packer(pack_cub, arguments)
