"""`dist-dml pack inaturalist`: iNaturalist 2018, divided as the metric-learning field does it.

    SRC/train2018.json, val2018.json          images (id, file_name), annotations (image_id,
                                              category_id), categories (id, name, supercategory)
    SRC/train_val2018/Plantae/7477/*.jpg
    SRC/Inat_dataset_splits/Inaturalist_{train,test}_set1.txt       one file_name a line

The split files are those of Smooth-AP (Brown et al., ECCV 2020); they may lie beside the json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.index import Index
from dist_dml.data.index_command import describe
from dist_dml.data.labels import TRAIN
from dist_dml.data.pack.columns import (
    add_common_arguments,
    add_official_arguments,
    estimated_bytes,
    present,
    shuffled_shards,
)
from dist_dml.data.pack.division import SEEN, check_classes, check_counts
from dist_dml.data.pack.image_files import Tree, encoders, find_tree, shrink
from dist_dml.data.pack.inaturalist_annotations import (
    checksum_of,
    joined_rows,
    read_annotations,
)
from dist_dml.data.pack.official_lists import read_lines
from dist_dml.data.pack.writing import write_pack
from dist_dml.errors import UsageError

VERSION = 1
_ANNOTATIONS = ("train2018.json", "val2018.json")
_SPLIT_FOLDER = "Inat_dataset_splits"
_SPLIT_FILES = {TRAIN: "Inaturalist_train_set1.txt", "test": "Inaturalist_test_set1.txt"}
LAYOUT = "train2018.json and val2018.json beside the folder train_val2018 (of train_val2018.tar.gz)"
_PUBLISHED = {
    "smooth-ap": {
        "train images": 325_846,
        "train classes": 5_690,
        "test images": 136_093,
        "test classes": 2_452,
    },
    "half": {"images": 461_939, "classes": 8_142},
    "official": {
        "train images": 437_513,
        "train classes": 8_142,
        "seen images": 24_426,
        "seen classes": 8_142,
    },
}


def pack_inaturalist(
    src: str | Path,
    out: str | Path,
    split_rule: str = "smooth-ap",
    seed: int = 0,
    resize: int = 0,
    shard_samples: int = 2048,
    processes: int = 0,
    strict_counts: bool = False,
    skip_missing: bool = False,
) -> Index:
    """Pack iNaturalist 2018; a class is a category, its name the category's id.

    Reading the annotations takes 2 s and 0.6 GB for 437,513 images (2026-11); after that a sample
    is a row of 80 bytes.

    Args:
        src: folder or zip with the official files.
        out: data set folder.
        split_rule: `smooth-ap`, the field's files (5,690 classes train, 2,452 test); `half`, the
            categories by id, first half train; `official`, train2018 is `train` and val2018, images
            of the same classes, is `seen`.
        seed: of the order of the samples.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.
        strict_counts: refuse other counts than the published ones instead of noting them.
        skip_missing: leave images out that are listed and not there.

    Raises:
        UsageError: a file is missing or not of the official layout, or a class is on both sides.
        RunError: an image is missing, or cannot be decoded where it should be resized.
    """
    if split_rule not in SPLIT_RULES:
        raise UsageError(f"--split-rule={split_rule}: expected {', '.join(SPLIT_RULES)}")
    tree = find_tree(Path(src), _ANNOTATIONS, LAYOUT)
    parts = [read_annotations(tree, name, number) for number, name in enumerate(_ANNOTATIONS)]
    splits = SPLIT_RULES[split_rule](tree, joined_rows(tree, parts))
    splits, size = present(tree, splits, _path_of, skip_missing)
    _check(tree, split_rule, splits, strict_counts)
    files = {name: part.checksum for name, part in zip(_ANNOTATIONS, parts, strict=True)}
    if split_rule == "smooth-ap":
        files |= {
            name: checksum_of(tree.read(_place(tree, name))) for name in _SPLIT_FILES.values()
        }
    source = {
        "kind": "inaturalist2018",
        "version": VERSION,
        "split_rule": split_rule,
        "seed": seed,
        "resize": resize,
        "shard_samples": shard_samples,
        "images": size,
        "files": files,
    }
    shards = shuffled_shards(splits, seed, shard_samples)
    render = partial(_render, tree, resize, parts[0].categories | parts[1].categories)
    if resize:
        size = min(size, estimated_bytes(render, shards))
    return write_pack(Path(out), shards, render, source, encoders(resize), size, processes)


def _place(tree: Tree, name: str) -> str:
    """Where a split file lies: in its own folder or beside the annotations."""
    for place in (f"{_SPLIT_FOLDER}/{name}", name):
        if tree.size(place) >= 0:
            return place
    raise UsageError(
        f"{tree.where(_SPLIT_FOLDER)}/{name}: no such file; get the split files of Smooth-AP "
        "(linked in its README), or choose --split-rule half or official"
    )


def _smooth_ap(tree: Tree, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The field's division, listed in two files; images in neither of them are left out."""
    order = np.argsort(rows["path"])
    paths = rows["path"][order]
    splits = {}
    for split, name in _SPLIT_FILES.items():
        place = _place(tree, name)
        listed = np.array([line.encode() for line in read_lines(tree, place)] or [b""])
        found = np.minimum(np.searchsorted(paths, listed), len(paths) - 1)
        wrong = np.flatnonzero(paths[found] != listed)
        if len(wrong):
            text = bytes(listed[wrong[0]]).decode()
            raise UsageError(
                f"{tree.where(place)} line {wrong[0] + 1}: {text[:80]!r} is in neither json "
                f"({len(wrong):,} such lines); get the official files"
            )
        if len(np.unique(found)) < len(found):
            raise UsageError(f"{tree.where(place)}: lists an image twice; get the official file")
        splits[split] = rows[order[found]]
    return splits


def _half(tree: Tree, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Categories by id: the first half trains. The general rule where no files are published."""
    categories = np.unique(rows["category"])
    training = np.isin(rows["category"], categories[: len(categories) // 2])
    return {TRAIN: rows[training], "test": rows[~training]}


def _official(tree: Tree, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The competition's division: the same classes on both sides, a closed set."""
    return {TRAIN: rows[rows["part"] == 0], SEEN: rows[rows["part"] == 1]}


SPLIT_RULES: Mapping[str, Callable[[Tree, np.ndarray], dict[str, np.ndarray]]] = {
    "smooth-ap": _smooth_ap,
    "half": _half,
    "official": _official,
}


def _check(tree: Tree, rule: str, splits: Mapping[str, np.ndarray], strict: bool) -> None:
    """Class-disjointness, and counts against the published ones."""
    where = str(tree.path)
    classes = {split: np.unique(rows["category"]).tolist() for split, rows in splits.items()}
    check_classes(where, {split: map(str, found) for split, found in classes.items()})
    found = {
        "images": sum(map(len, splits.values())),
        "classes": len({c for codes in classes.values() for c in codes}),
        **{f"{split} images": len(rows) for split, rows in splits.items()},
        **{f"{split} classes": len(codes) for split, codes in classes.items()},
    }
    check_counts(found, _PUBLISHED[rule], strict, where)


def _path_of(split: str, row: Any) -> str:
    return row["path"].decode()


def _render(
    tree: Tree, resize: int, categories: Mapping[int, tuple[str, str]], row: Any
) -> dict[str, str | bytes]:
    path, category = row["path"].decode(), int(row["category"])
    data = tree.read(path)
    if resize:
        data = shrink(data, "jpg", resize, tree.where(path))[0]
    name, supercategory = categories[category]
    described = {
        "label": str(category),
        "file": path,
        "image_id": int(row["image"]),
        "name": name,
        "supercategory": supercategory,
        "part": _ANNOTATIONS[row["part"]].removesuffix(".json"),
    }
    return {
        "__key__": path.rpartition(".")[0],
        "jpg": data,
        "cls": str(category).encode(),
        "json": json.dumps(described).encode(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack inaturalist`."""
    parser.add_argument("src", help=f"folder with {LAYOUT}")
    parser.add_argument("out", help="folder of the new data set")
    parser.add_argument(
        "--split-rule", choices=tuple(SPLIT_RULES), default="smooth-ap", help="(smooth-ap)"
    )
    add_official_arguments(parser)
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack inaturalist`. Returns the exit code."""
    index = pack_inaturalist(
        arguments.src,
        arguments.out,
        arguments.split_rule,
        arguments.seed,
        arguments.resize,
        arguments.shard_samples,
        arguments.processes,
        arguments.strict_counts,
        arguments.skip_missing,
    )
    print(describe(index))
    return 0
