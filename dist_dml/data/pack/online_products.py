"""`dist-dml pack products`: Stanford Online Products, 22,634 articles of twelve kinds.

The split is the official one, which metric learning uses as it is: `Ebay_train.txt` holds classes
1..11318, `Ebay_test.txt` 11319..22634.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_dml.data.index import Index
from dist_dml.data.pack.image_files import ImageSample, Tree, find_tree, unique_keys
from dist_dml.data.pack.listed_images import (
    PackOptions,
    Published,
    add_pack_arguments,
    pack_listed,
    run_packer,
)
from dist_dml.data.pack.official_lists import read_table, whole_number

PUBLISHED = Published(
    kind="online_products",
    version=1,
    title="Stanford Online Products",
    counts={"train": (59_551, 11_318), "test": (60_502, 11_316)},
)
_LISTS = {"train": "Ebay_train.txt", "test": "Ebay_test.txt"}
_COLUMNS = "image_id class_id super_class_id path"
_LAYOUT = (
    f"Stanford_Online_Products/ with {_LISTS['train']}, {_LISTS['test']} and bicycle_final/ .. "
    "toaster_final/"
)


def pack_online_products(
    src: str | Path,
    out: str | Path,
    seed: int = 0,
    resize: int = 0,
    shard_samples: int = 2048,
    processes: int = 0,
    strict_counts: bool = False,
    skip_missing: bool = False,
) -> Index:
    """Pack Stanford Online Products with its official split.

    The label is the official class number. The `.json` has `image_id`, `class_id`,
    `super_class_id` and `super_class`, the kind of article as the folder names it ("bicycle").

    Args:
        src: `Stanford_Online_Products.zip`, the folder of that name, or the one it lies in.
        out: data set folder.
        seed: of the order of the samples.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.
        strict_counts: refuse other counts than the published ones instead of noting them.
        skip_missing: leave images out that are listed and not there.

    Raises:
        UsageError: another layout, a missing file, a damaged list, a class in both lists, or see
            `pack_listed`.
        RunError: an image cannot be read, or not decoded where it is resized.
    """
    options = PackOptions(seed, resize, shard_samples, processes, strict_counts, skip_missing)
    tree = find_tree(Path(src), list(_LISTS.values()), _LAYOUT)
    return pack_listed(Path(out), tree, PUBLISHED, _splits(tree), options)


def _splits(tree: Tree) -> dict[str, list[ImageSample]]:
    """The samples by split, in the order of the lists."""
    tables = {split: read_table(tree, name, _COLUMNS, True) for split, name in _LISTS.items()}
    keys = iter(unique_keys(row[3] for table in tables.values() for _, row in table))
    return {
        split: [_sample(next(keys), where, row) for where, row in table]
        for split, table in tables.items()
    }


def _sample(key: str, where: str, row: list[str]) -> ImageSample:
    numbers = [whole_number(text, where) for text in row[:3]]
    facts = dict(zip(("image_id", "class_id", "super_class_id"), numbers, strict=True))
    super_class = row[3].split("/")[0].removesuffix("_final")
    return ImageSample(key, str(numbers[1]), row[3], {**facts, "super_class": super_class})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack products`."""
    add_pack_arguments(parser, f"Stanford_Online_Products.zip, or extracted: {_LAYOUT}")


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack products`. Returns the exit code."""
    return run_packer(pack_online_products, arguments)
