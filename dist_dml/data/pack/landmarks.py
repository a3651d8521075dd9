"""`dist-dml pack landmarks`: Google Landmarks v2, as `train`, `gallery` and `query`.

    SRC/train/0/1/2/0123456789abcdef.jpg, SRC/index/..., SRC/test/...
    train.csv                     id,url,landmark_id                       4,132,914 images
    train_clean.csv               landmark_id,images (ids and blanks)      1,580,470 images
    index.csv                     id                                       761,757 images
    index_image_to_landmark.csv   id,landmark_id        of ANOTHER numbering than train's
    retrieval_solution_v2.1.csv   id,images,Usage       test images and what they should find

The csv files may also lie in metadata/, train/, index/, test/ or ground_truth/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
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
    file_hash,
    present,
    shuffled_shards,
)
from dist_dml.data.pack.division import check_counts
from dist_dml.data.pack.image_files import Tree, encoders, shrink
from dist_dml.data.pack.landmark_lists import (
    PLACES,
    place_of,
    read_clean,
    read_columns,
    read_ids,
    read_solution,
    read_train,
)
from dist_dml.data.pack.listed_images import note
from dist_dml.data.pack.writing import write_pack
from dist_dml.errors import UsageError

VERSION = 1
GALLERY, QUERY = "gallery", "query"
LAYOUT = "train/, index/ and test/ with 0/1/2/0123456789abcdef.jpg, and the official csv files"
_FOLDERS = {TRAIN: "train", GALLERY: "index", QUERY: "test"}
_PREFIXES = {TRAIN: "train", GALLERY: "index", QUERY: "index"}
_TRAIN_FILES = {"clean": "train_clean.csv", "full": "train.csv"}
_GALLERY_FILES = ("index.csv", "index_image_to_landmark.csv", "retrieval_solution_v2.1.csv")
_CATEGORIES = ("train_label_to_category.csv", "index_label_to_category.csv")
_SPLITS = (TRAIN, GALLERY, QUERY)
_ROW = np.dtype([("image", "<u8"), ("landmark", "<i8"), ("split", "i1")])
_UNKNOWN = -1
"""Landmark of an index image that has none: it is a class of its own, relevant to nothing."""
_PUBLISHED = {
    "clean": {"train images": 1_580_470, "train classes": 81_313},
    "full": {"train images": 4_132_914, "train classes": 203_094},
    "retrieval": {"gallery images": 761_757, "query images": 1_129},
}
_Facts = Mapping[int, Mapping[str, Any]]


def pack_landmarks(
    src: str | Path,
    out: str | Path,
    subset: str = "clean",
    train_only: bool = False,
    seed: int = 0,
    resize: int = 0,
    shard_samples: int = 2048,
    processes: int = 0,
    strict_counts: bool = False,
    skip_missing: bool = False,
) -> Index:
    """Pack Google Landmarks v2.

    `train` is the clean or the full training set; classes are called `train_000123`. `gallery` is
    the index set, `query` the test images that the retrieval task scores; their classes are called
    `index_000123`, since the two numberings have nothing to do with each other. A query belongs to
    the landmark that most of its relevant images show; its `.json` lists all of them as `relevant`,
    for the official mAP@100. Takes 17 bytes a sample of memory, and 1 s to
    read a million rows of a csv (2026-11).

    Args:
        src: the folder.
        out: data set folder.
        subset: `clean` (81,313 landmarks) or `full` (203,094).
        train_only: leave gallery and queries out.
        seed: of the order of the samples.
        resize: short side of the stored image in pixels, if it is longer; 0 copies the bytes.
        shard_samples: images of a tar.
        processes: writing processes; 0 takes one per core.
        strict_counts: refuse other counts than the published ones instead of noting them.
        skip_missing: leave images out that are listed and not there.

    Raises:
        UsageError: a file is missing or not of the official layout.
        RunError: an image cannot be read, or not decoded where it is resized.
    """
    tree, places = _found(Path(src), subset, train_only)
    read = read_clean if subset == "clean" else read_train
    splits = {TRAIN: _rows(TRAIN, *read(tree, places[_TRAIN_FILES[subset]]))}
    facts: _Facts = {}
    if not train_only:
        retrieval, facts = _retrieval(tree, places)
        splits |= retrieval
        _note_overlap(tree)
    splits, size = present(tree, splits, _path_of, skip_missing)
    published = _PUBLISHED[subset] | _PUBLISHED["retrieval"]
    check_counts(_counts(splits), published, strict_counts, str(src))
    source = {
        "kind": "landmarks2",
        "version": VERSION,
        "subset": subset,
        "train_only": train_only,
        "seed": seed,
        "resize": resize,
        "shard_samples": shard_samples,
        "images": size,
        "files": {name: file_hash(Path(src, place)) for name, place in places.items()},
    }
    shards = shuffled_shards(splits, seed, shard_samples)
    render = partial(_render, tree, resize, facts)
    if resize:
        size = min(size, estimated_bytes(render, shards))
    return write_pack(Path(out), shards, render, source, encoders(resize), size, processes)


def _found(src: Path, subset: str, train_only: bool) -> tuple[Tree, dict[str, str]]:
    """The data set's folder and where its csv files lie below it.

    Raises:
        UsageError: names what is missing.
    """
    if subset not in _TRAIN_FILES:
        raise UsageError(f"--subset={subset}: expected {' or '.join(_TRAIN_FILES)}")
    if not src.is_dir():
        raise UsageError(f"{src}: no such folder; expected {LAYOUT}")
    tree = Tree(src)
    names = [_TRAIN_FILES[subset], *(() if train_only else _GALLERY_FILES)]
    places = {name: place_of(tree, name, LAYOUT) for name in names}
    for split in (TRAIN,) if train_only else _FOLDERS:
        if not (src / _FOLDERS[split]).is_dir():
            raise UsageError(f"{tree.where(_FOLDERS[split])}: no such folder; expected {LAYOUT}")
    return tree, places


def _rows(split: str, images: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    rows = np.empty(len(images), _ROW)
    rows["image"], rows["landmark"], rows["split"] = images, landmarks, _SPLITS.index(split)
    return rows


def _retrieval(tree: Tree, places: Mapping[str, str]) -> tuple[dict[str, np.ndarray], _Facts]:
    """Rows of gallery and queries, and what the `.json` of each query says besides."""
    index, labels, solution = (places[name] for name in _GALLERY_FILES)
    gallery = np.sort(read_ids(tree, index))
    landmarks = np.full(len(gallery), _UNKNOWN, np.int64)
    images, known = read_train(tree, labels)
    found = np.minimum(np.searchsorted(gallery, images), len(gallery) - 1)
    inside = gallery[found] == images
    landmarks[found[inside]] = known[inside]
    unknown = int(np.sum(landmarks == _UNKNOWN))
    if unknown:
        note(f"{tree.where(labels)}: {unknown:,} index images have no landmark; they match nothing")
    sizes = dict(
        zip(*map(np.ndarray.tolist, np.unique(landmarks, return_counts=True)), strict=True)
    )
    queries, several, others = [], 0, 0
    facts: dict[int, Mapping[str, Any]] = {}
    for image, relevant, usage in read_solution(tree, solution):
        where = np.minimum(np.searchsorted(gallery, relevant), len(gallery) - 1)
        absent = np.flatnonzero(gallery[where] != np.array(relevant, np.uint64))
        if len(absent):
            raise UsageError(
                f"{tree.where(solution)}: query {image:016x} should find "
                f"{relevant[int(absent[0])]:016x}, which {index} does not list; get both again"
            )
        shown, counts = np.unique(landmarks[where], return_counts=True)
        landmark = int(shown[np.argmax(np.where(shown == _UNKNOWN, 0, counts))])
        several += len(shown) > 1
        others += sizes[landmark] != len(relevant)
        queries.append((image, landmark))
        facts[image] = {"usage": usage, "relevant": [f"{one:016x}" for one in relevant]}
    if not queries:
        raise UsageError(f"{tree.where(solution)}: scores no query; get the official file again")
    note(
        f"{several:,} of {len(queries):,} queries should find several landmarks and {others:,} not "
        "all images of theirs: scores by class are near the official ones, not equal"
    )
    images, classes = np.array([q[0] for q in queries], np.uint64), [q[1] for q in queries]
    return {
        GALLERY: _rows(GALLERY, gallery, landmarks),
        QUERY: _rows(QUERY, images, np.array(classes, np.int64)),
    }, facts


def _note_overlap(tree: Tree) -> None:
    """How many landmarks of the index are trained on, where the category files tell it."""
    found = [f + name for name in _CATEGORIES for f in PLACES if tree.size(f + name) >= 0]
    if len(found) < len(_CATEGORIES):
        return
    train, index = (
        {
            c
            for _, batch in read_columns(tree, n, ("category",))
            for c in batch["category"].to_pylist()
        }
        for n in found
    )
    note(
        f"{len(train & index):,} of {len(index):,} index landmarks are also in train.csv: the "
        "official protocol is not class-disjoint"
    )


def _counts(splits: Mapping[str, np.ndarray]) -> dict[str, int]:
    counts = {f"{split} images": len(rows) for split, rows in splits.items()}
    return counts | {"train classes": len(np.unique(splits[TRAIN]["landmark"]))}


def _path_of(split: str, row: Any) -> str:
    name = f"{int(row['image']):016x}"
    return f"{_FOLDERS[split]}/{name[0]}/{name[1]}/{name[2]}/{name}.jpg"


def _render(tree: Tree, resize: int, facts: _Facts, row: Any) -> dict[str, str | bytes]:
    split, image, landmark = _SPLITS[row["split"]], int(row["image"]), int(row["landmark"])
    path = _path_of(split, row)
    data = tree.read(path)
    if resize:
        data = shrink(data, "jpg", resize, tree.where(path))[0]
    label = f"{_PREFIXES[split]}_{landmark:06d}" if landmark >= 0 else f"alone_{image:016x}"
    described: dict[str, Any] = {"label": label, "file": path}
    if landmark >= 0:
        described["landmark_id"] = landmark
    if split == QUERY:
        described |= facts[image]
    return {
        "__key__": f"{image:016x}",
        "jpg": data,
        "cls": label.encode(),
        "json": json.dumps(described).encode(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml pack landmarks`."""
    parser.add_argument("src", help=f"folder with {LAYOUT}")
    parser.add_argument("out", help="folder of the new data set")
    parser.add_argument("--subset", choices=tuple(_TRAIN_FILES), default="clean", help="(clean)")
    parser.add_argument("--train-only", action="store_true", help="no gallery and no queries")
    add_official_arguments(parser)
    add_common_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """`dist-dml pack landmarks`. Returns the exit code."""
    index = pack_landmarks(
        arguments.src,
        arguments.out,
        arguments.subset,
        arguments.train_only,
        arguments.seed,
        arguments.resize,
        arguments.shard_samples,
        arguments.processes,
        arguments.strict_counts,
        arguments.skip_missing,
    )
    print(describe(index))
    return 0
