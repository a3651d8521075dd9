"""`dist-dml pack cars`: Cars196 in any of the three layouts that it is passed on in.

Their images are the same and so are the class numbers; metric learning merges the data set's own
two parts, trains on the first 98 classes and tests on the last 98. The annotations: see
`cars_annotations`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_dml.data.index import Index
from dist_dml.data.pack.cars_annotations import LAYOUT, CarRow, find_cars
from dist_dml.data.pack.image_files import ImageSample, unique_keys
from dist_dml.data.pack.listed_images import (
    PackOptions,
    Published,
    add_pack_arguments,
    pack_listed,
    run_packer,
)

PUBLISHED = Published(
    kind="cars196",
    version=1,
    title="Cars196",
    counts={"train": (8_054, 98), "test": (8_131, 98)},
)
LAST_TRAINING_CLASS = 98


def pack_cars(
    src: str | Path,
    out: str | Path,
    seed: int = 0,
    resize: int = 0,
    shard_samples: int = 2048,
    processes: int = 0,
    strict_counts: bool = False,
    skip_missing: bool = False,
) -> Index:
    """Pack Cars196: `train` is class 1..98, `test` 99..196, both parts merged.

    The label is number and name, "001.AM General Hummer SUV 2000": names alone do not sort as the
    numbers do ("smart fortwo" is the last one). The `.json` has `class_id`, `official_split` (the
    part that the image came in) and `box`.

    Args:
        src: the folder of the data set, the one it lies in, or a zip of it.
        out: data set folder.
        seed: of the order of the samples.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.
        strict_counts: refuse other counts than the published ones instead of noting them.
        skip_missing: leave images out that are listed and not there.

    Raises:
        UsageError: another layout, a missing or damaged file, or see `pack_listed`.
        RunError: an image cannot be read, or not decoded where it is resized.
    """
    options = PackOptions(seed, resize, shard_samples, processes, strict_counts, skip_missing)
    cars = find_cars(Path(src))
    keys = unique_keys(row.path for row in cars.rows)
    splits: dict[str, list[ImageSample]] = {"train": [], "test": []}
    for key, row in zip(keys, cars.rows, strict=True):
        split = "train" if row.class_id <= LAST_TRAINING_CLASS else "test"
        splits[split].append(_sample(key, row, cars.names[row.class_id - 1]))
    return pack_listed(Path(out), cars.tree, PUBLISHED, splits, options)


def _sample(key: str, row: CarRow, name: str) -> ImageSample:
    left, top, right, bottom = row.corners
    facts = {"class_id": row.class_id, "official_split": row.part}
    box = (left, top, right - left, bottom - top)
    return ImageSample(key, f"{row.class_id:03d}.{name}", row.path, facts, box)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack cars`."""
    add_pack_arguments(parser, f"folder or zip with {LAYOUT}")


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack cars`. Returns the exit code."""
    return run_packer(pack_cars, arguments)
