"""Google Landmarks v2's csv files as arrays: an image id of 16 hexadecimal digits is one uint64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from dist_dml.data.pack.image_files import Tree
from dist_dml.errors import UsageError

_DIGITS = 16
_SHIFTS = np.arange(60, -1, -4, dtype=np.uint64)
_VALUES = np.full(256, 255, np.uint8)
for _value, _digit in enumerate(b"0123456789abcdef"):
    _VALUES[_digit] = _value
PLACES = ("", "metadata/", "train/", "index/", "test/", "ground_truth/")
"""Where the csv files may lie below the data set's folder."""


def place_of(tree: Tree, name: str, layout: str) -> str:
    """The path of a csv file below the tree.

    Raises:
        UsageError: it is in none of the usual places.
    """
    for folder in PLACES:
        if tree.size(folder + name) >= 0:
            return folder + name
    raise UsageError(f"{tree.where(name)}: no such file; expected {layout}")


def read_columns(tree: Tree, name: str, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Batches of a csv file with a header: how messages call the place, and a pyarrow table.

    Reads 16 MiB at a time. `landmark_id` is int64, everything else text.

    Raises:
        UsageError: it cannot be read, lacks a column, or has a landmark that is no integer.
    """
    import pyarrow
    from pyarrow import csv

    types = {c: pyarrow.int64() if c == "landmark_id" else pyarrow.string() for c in columns}
    where, rows = tree.where(name), 0
    try:
        with csv.open_csv(
            Path(tree.path, tree.inside + name),
            read_options=csv.ReadOptions(block_size=16 << 20),
            convert_options=csv.ConvertOptions(
                column_types=types, include_columns=list(columns), strings_can_be_null=False
            ),
        ) as reader:
            for batch in reader:
                yield f"{where} after row {rows:,}", batch
                rows += len(batch)
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        reason = str(error).strip("'\"").splitlines()[0][:120]
        raise UsageError(
            f"{where}: is no csv with the columns {','.join(columns)} ({reason}); get the official "
            "file again"
        ) from None


def image_ids(texts: Sequence[str], where: str) -> UInt64[np.ndarray, " n"]:
    """The numbers that image ids stand for.

    Raises:
        UsageError: one has not 16 digits of 0-9a-f; names it.
    """
    if not len(texts):
        return np.empty(0, np.uint64)
    lengths = np.array([len(text) for text in texts])
    odd = np.flatnonzero(lengths != _DIGITS)
    if not len(odd):
        encoded = "".join(texts).encode()
        if len(encoded) == _DIGITS * len(texts):
            digits = _VALUES[np.frombuffer(encoded, np.uint8)].reshape(-1, _DIGITS)
            odd = np.flatnonzero((digits == 255).any(axis=1))
            if not len(odd):
                return np.bitwise_or.reduce(digits.astype(np.uint64) << _SHIFTS, axis=1)
        else:
            odd = np.array([i for i, text in enumerate(texts) if not text.isascii()])
    raise UsageError(
        f"{where}: image id {texts[int(odd[0])][:40]!r} has not 16 digits of 0-9a-f; get the "
        "official file"
    )


def read_train(tree: Tree, name: str) -> tuple[UInt64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Image and landmark of each row of `train.csv` or `index_image_to_landmark.csv`."""
    ids, landmarks = [], []
    for where, batch in read_columns(tree, name, ("id", "landmark_id")):
        ids.append(image_ids(batch["id"].to_pylist(), where))
        landmarks.append(_landmarks(batch, where))
    return _joined(tree, name, ids), np.concatenate(landmarks)


def read_clean(tree: Tree, name: str) -> tuple[UInt64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """The same of `train_clean.csv`, which has a row per landmark, its images in one text."""
    ids, landmarks = [], []
    for where, batch in read_columns(tree, name, ("landmark_id", "images")):
        lists = [text.split() for text in batch["images"].to_pylist()]
        ids.append(image_ids([image for images in lists for image in images], where))
        landmarks.append(np.repeat(_landmarks(batch, where), [len(images) for images in lists]))
    return _joined(tree, name, ids), np.concatenate(landmarks)


def read_ids(tree: Tree, name: str) -> UInt64[np.ndarray, " n"]:
    """The images of `index.csv`."""
    found = [image_ids(b["id"].to_pylist(), w) for w, b in read_columns(tree, name, ("id",))]
    return _joined(tree, name, found)


def read_solution(tree: Tree, name: str) -> list[tuple[int, list[int], str]]:
    """Query, relevant index images and part (`Public`, `Private`) of `retrieval_solution`.

    A query whose `images` is `None` is not scored and left out, as one of any other `Usage`.
    """
    queries = []
    for where, batch in read_columns(tree, name, ("id", "images", "Usage")):
        ids = image_ids(batch["id"].to_pylist(), where).tolist()
        rows = zip(ids, batch["images"].to_pylist(), batch["Usage"].to_pylist(), strict=True)
        for query, images, usage in rows:
            if usage in ("Public", "Private") and images not in ("None", ""):
                queries.append((query, image_ids(images.split(), where).tolist(), usage))
    return queries


def _landmarks(batch: Any, where: str) -> Int64[np.ndarray, " n"]:
    column = batch["landmark_id"]
    if column.null_count or (column.to_numpy() < 0).any():
        raise UsageError(f"{where}: a landmark_id is empty or negative; get the official file")
    return column.to_numpy()


def _joined(tree: Tree, name: str, parts: Sequence[np.ndarray]) -> UInt64[np.ndarray, " n"]:
    """All ids; an image is listed once.

    Raises:
        UsageError: there is none, or one comes twice.
    """
    ids = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    values, counts = np.unique(ids, return_counts=True)
    if not len(ids) or counts.max() > 1:
        what = f"lists {values[counts.argmax()]:016x} twice" if len(ids) else "lists no image"
        raise UsageError(f"{tree.where(name)}: {what}; get the official file again")
    return ids
