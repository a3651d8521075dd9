"""From what a shard calls a class to class ids: contiguous, training classes first."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64

from dist_dml.data.shards import ScannedSample
from dist_dml.errors import UsageError

TRAIN = "train"
"""The split whose classes get the ids 0..num_classes-1."""
_INTEGER = re.compile(r"^[+-]?\d+$")


@dataclass(frozen=True)
class Classes:
    """Names by class id, how many of them are training classes, and the class of every sample."""

    names: tuple[str, ...]
    num_training: int
    class_id: Int64[np.ndarray, " N"]


def read_label(stream: BinaryIO, path: Path, sample: ScannedSample, label_key: str) -> str:
    """The label of one sample as text: its `.cls`, otherwise `label_key` of its `.json`.

    Raises:
        UsageError: if it is not UTF-8, empty, not JSON, or absent from the JSON object.
    """
    where = f"shard {path}: key {sample.key}"
    member = sample.labels.get("cls") or sample.labels["json"]
    stream.seek(member.offset)
    try:
        text = stream.read(member.size).decode("utf-8").strip()
    except UnicodeDecodeError:
        raise UsageError(
            f"{where}: .{member.extension} is not UTF-8; write the label as text"
        ) from None
    if member.extension == "json":
        text = _json_label(text, where, label_key)
    if not text:
        raise UsageError(
            f"{where}: .{member.extension} holds an empty label; write an integer or a name"
        )
    return text


def _json_label(text: str, where: str, label_key: str) -> str:
    try:
        content = json.loads(text)
    except ValueError:
        raise UsageError(f"{where}: .json is not valid JSON; write it again") from None
    if not isinstance(content, dict) or label_key not in content:
        keys = ", ".join(sorted(content)[:8]) if isinstance(content, dict) else "no object"
        raise UsageError(
            f"{where}: .json has no {label_key!r} (it has: {keys}); name the key with --label-key"
        )
    label = content[label_key]
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise UsageError(f"{where}: label {label!r} is neither an integer nor a name; correct it")
    return str(label).strip()


def number_classes(
    shards: Sequence[Path],
    splits: Sequence[str],
    scans: Sequence[tuple[Any, Any]],
    num_classes: int,
) -> Classes:
    """Give every label a class id.

    The labels of the split `train` get 0, 1, ... in their sorted order (integers by value, if all
    labels are integers); then come the labels that only other splits have, in the same order. With
    `num_classes` above 0 the training labels are integers in 0..num_classes-1 and stay as they are.

    Labels come as pyarrow columns: 10^7 of them are 0.1 GB, as Python strings 0.6 GB.

    Args:
        shards: paths, for messages.
        splits: the split of each shard.
        scans: keys and labels of each shard, as pyarrow arrays of strings.
        num_classes: see above.

    Raises:
        UsageError: if a training label is not an integer in 0..num_classes-1.
    """
    columns = [labels for _, labels in scans]
    training = _distinct([c for split, c in zip(splits, columns, strict=True) if split == TRAIN])
    known = set(training)
    others = [label for label in _distinct(columns) if label not in known]
    integers = all(_INTEGER.match(label) for names in (training, others) for label in names)

    def order(label: str) -> tuple[int, str]:
        return (int(label) if integers else 0, label)

    if num_classes <= 0:
        names = sorted(training, key=order) + sorted(others, key=order)
        return Classes(tuple(names), len(training), _ids(scans, names, range(len(names))))
    _check_range(shards, splits, scans, num_classes)
    every = training + others
    taken = {
        label: int(label)
        for label in every
        if _INTEGER.match(label) and 0 <= int(label) < num_classes
    }
    extra = sorted((label for label in every if label not in taken), key=order)
    numbers = [*taken.values(), *range(num_classes, num_classes + len(extra))]
    names = [str(i) for i in range(num_classes)] + extra
    return Classes(tuple(names), num_classes, _ids(scans, [*taken, *extra], numbers))


def _distinct(columns: Sequence[Any]) -> list[str]:
    """The labels that occur in pyarrow columns, each once."""
    import pyarrow

    return pyarrow.chunked_array(columns, pyarrow.string()).unique().to_pylist()


def _ids(
    scans: Sequence[tuple[Any, Any]], names: Sequence[str], numbers: Sequence[int]
) -> Int64[np.ndarray, " N"]:
    """The class of every sample, where `names[i]` is called `numbers[i]`."""
    import pyarrow
    from pyarrow.compute import index_in  # pyright: ignore[reportAttributeAccessIssue]

    # All columns in one call: each call makes a table of the names.
    labels = pyarrow.chunked_array([labels for _, labels in scans], pyarrow.string())
    places = index_in(labels, pyarrow.array(names, pyarrow.string())).to_numpy()
    return np.asarray(numbers, np.int64)[places]


def _check_range(
    shards: Sequence[Path],
    splits: Sequence[str],
    scans: Sequence[tuple[Any, Any]],
    num_classes: int,
) -> None:
    for shard, split, (keys, labels) in zip(shards, splits, scans, strict=True):
        if split != TRAIN:
            continue
        for row, label in enumerate(labels.to_pylist()):
            if not _INTEGER.match(label) or not 0 <= int(label) < num_classes:
                raise UsageError(
                    f"shard {shard}: key {keys[row].as_py()} has label {label!r}, expected an "
                    f"integer in 0..{num_classes - 1}; raise --num-classes, or 0 to number the "
                    "labels"
                )
