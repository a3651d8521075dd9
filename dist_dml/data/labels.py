"""From what a shard calls a class to class ids: contiguous, training classes first."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from dist_dml.errors import UsageError

TRAIN = "train"
"""The split whose classes get the ids 0..num_classes-1."""
LabelKind = Literal["no_label", "bad_label", "label_not_text"]
_INTEGER = re.compile(r"^[+-]?\d+$")


@dataclass(frozen=True)
class Classes:
    """Names by class id, how many of them are training classes, and the class of every sample."""

    names: tuple[str, ...]
    num_training: int
    class_id: Int64[np.ndarray, " N"]


class LabelFault(Exception):
    """A label that cannot be used; the message names the member and says what to do."""

    def __init__(self, reason: str, kind: LabelKind) -> None:
        super().__init__(reason, kind)
        self.reason, self.kind = reason, kind


def cls_label(data: bytes) -> str:
    """The label that a `.cls` member states.

    Raises:
        LabelFault: it is not UTF-8, or empty.
    """
    return _not_empty(_text(data, "cls"), "cls")


def json_label(data: bytes, label_key: str) -> str:
    """The label that a `.json` member states under `label_key`, as text.

    Raises:
        LabelFault: it is not UTF-8, not JSON, has no such key, or the value is neither an integer
            nor a name.
    """
    try:
        content = json.loads(_text(data, "json"))
    except (ValueError, RecursionError):
        raise LabelFault(".json is not valid JSON; write it again", "bad_label") from None
    if not isinstance(content, dict) or label_key not in content:
        keys = ", ".join(sorted(content)[:8]) if isinstance(content, dict) else "no object"
        raise LabelFault(
            f".json has no {label_key!r} (it has: {keys}); name the key with --label-key",
            "no_label",
        )
    return _not_empty(value_label(content[label_key], ".json"), "json")


def value_label(value: object, where: str) -> str:
    """An integer or a name as the text of a label.

    Raises:
        LabelFault: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        shown = f"{value!r:.60}"
        raise LabelFault(
            f"{where} has label {shown}, neither an integer nor a name; correct it", "bad_label"
        )
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half a character.
        raise LabelFault(f"{where} has label {text!a:.60}, not text", "label_not_text") from None
    return text


def _text(data: bytes, extension: str) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise LabelFault(
            f".{extension} is not UTF-8; write the label as text", "label_not_text"
        ) from None


def _not_empty(text: str, extension: str) -> str:
    if not text:
        raise LabelFault(
            f".{extension} holds an empty label; write an integer or a name", "bad_label"
        )
    return text


def number_classes(
    shards: Sequence[str],
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
        shards: paths or URLs, for messages.
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
    shards: Sequence[str],
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
