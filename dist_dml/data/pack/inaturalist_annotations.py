"""iNaturalist 2018's annotation files, in COCO's form, as rows of an array.

{"images": [{"id", "file_name"}], "annotations": [{"image_id", "category_id"}],
 "categories": [{"id", "name", "supercategory"}]}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_dml.data.pack.image_files import Tree
from dist_dml.errors import UsageError

# Also keeps names inside the tree, and makes the name without its ending a key of its own.
_FILE_NAME = re.compile(r"(?:[\w-]+/)+[\w-]+\.jpe?g", re.ASCII)


def checksum_of(data: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, eq=False)
class Annotations:
    """One annotation file: a row per image (`_row_type`), names by category, SHA-256."""

    rows: np.ndarray
    categories: dict[int, tuple[str, str]]
    checksum: str


def read_annotations(tree: Tree, name: str, part: int) -> Annotations:
    """Read one annotation file.

    Args:
        tree: where it lies.
        name: of the file.
        part: its number, a column of its rows.

    Raises:
        UsageError: it is not of the official form, or an image has no known category or a name that
            is no path below the tree.
    """
    where = tree.where(name)
    data = tree.read(name)
    checksum = checksum_of(data)
    try:
        content = json.loads(data)
        del data
        label_of = {a["image_id"]: a["category_id"] for a in content["annotations"]}
        names = [image["file_name"] for image in content["images"]]
        ids = np.array([image["id"] for image in content["images"]], np.int64)
        found = {c["id"]: (c["name"], c["supercategory"]) for c in content["categories"]}
        labels = [label_of.get(image, -1) for image in ids.tolist()]
        codes = np.array(labels, np.int32)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UsageError(
            f"{where}: is not the official file (no readable images, annotations or categories: "
            f"{type(error).__name__} {str(error)[:60]}); extract {name}.tar.gz again"
        ) from None
    for number, text in enumerate(names):
        if not isinstance(text, str) or not _FILE_NAME.fullmatch(text):
            raise UsageError(
                f"{where}: image {ids[number]} has file_name {text!r:.80}, expected "
                "train_val2018/.../name.jpg; get the official file"
            )
    unknown = np.flatnonzero(~np.isin(codes, np.array(list(found), np.int32)))
    if len(unknown):
        raise UsageError(
            f"{where}: image {ids[unknown[0]]} has no annotation with a known category "
            f"({len(unknown):,} such images); get the official file"
        )
    paths = np.array([text.encode() for text in names] or [b""], "S")[: len(names)]
    rows = np.empty(len(names), _row_type(paths.dtype.itemsize))
    rows["path"], rows["category"], rows["image"], rows["part"] = paths, codes, ids, part
    return Annotations(rows, found, checksum)


def _row_type(width: int) -> np.dtype:
    """A row: file name, category, image id, and in which annotation file it stands."""
    fields = [("path", f"S{width}"), ("category", "<i4"), ("image", "<i8"), ("part", "i1")]
    return np.dtype(fields)


def joined_rows(tree: Tree, parts: Sequence[Annotations]) -> np.ndarray:
    """The rows of several annotation files.

    Raises:
        UsageError: a file is listed twice, or there is none.
    """
    wide = _row_type(max(part.rows["path"].itemsize for part in parts))
    rows = np.concatenate([part.rows.astype(wide) for part in parts])
    paths, counts = np.unique(rows["path"], return_counts=True)
    if not len(rows) or counts.max() > 1:
        what = f"{paths[counts.argmax()].decode()} is listed twice" if len(rows) else "no images"
        raise UsageError(f"{tree.path}: {what}; get the official files again")
    return rows
