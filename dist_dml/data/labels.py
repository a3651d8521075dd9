"""From what a shard calls a class to class ids: contiguous, training classes first."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
    scans: Sequence[tuple[Sequence[str], Sequence[str]]],
    num_classes: int,
) -> Classes:
    """Give every label a class id.

    The labels of the split `train` get 0, 1, ... in their sorted order (integers by value, if all
    labels are integers); then come the labels that only other splits have, in the same order. With
    `num_classes` above 0 the training labels are integers in 0..num_classes-1 and stay as they are.

    Args:
        shards: paths, for messages.
        splits: the split of each shard.
        scans: keys and labels of each shard.
        num_classes: see above.

    Raises:
        UsageError: if a training label is not an integer in 0..num_classes-1.
    """
    training = {
        label
        for split, (_, labels) in zip(splits, scans, strict=True)
        if split == TRAIN
        for label in labels
    }
    others = {label for _, labels in scans for label in labels} - training
    integers = all(_INTEGER.match(label) for label in training | others)

    def order(label: str) -> tuple[int, str]:
        return (int(label) if integers else 0, label)

    if num_classes <= 0:
        names = sorted(training, key=order) + sorted(others, key=order)
        number = {name: i for i, name in enumerate(names)}
        num_training = len(training)
    else:
        _check_range(shards, splits, scans, num_classes)
        names = [str(i) for i in range(num_classes)]
        taken = {
            label: int(label)
            for label in training | others
            if _INTEGER.match(label) and 0 <= int(label) < num_classes
        }
        extra = sorted((training | others) - set(taken), key=order)
        names += extra
        number = taken | {name: num_classes + i for i, name in enumerate(extra)}
        num_training = num_classes
    ids = [np.array([number[label] for label in labels], np.int64) for _, labels in scans]
    return Classes(tuple(names), num_training, np.concatenate(ids))


def _check_range(
    shards: Sequence[Path],
    splits: Sequence[str],
    scans: Sequence[tuple[Sequence[str], Sequence[str]]],
    num_classes: int,
) -> None:
    for shard, split, (keys, labels) in zip(shards, splits, scans, strict=True):
        if split != TRAIN:
            continue
        for key, label in zip(keys, labels, strict=True):
            if not _INTEGER.match(label) or not 0 <= int(label) < num_classes:
                raise UsageError(
                    f"shard {shard}: key {key} has label {label!r}, expected an integer in "
                    f"0..{num_classes - 1}; raise --num-classes, or 0 to number the labels"
                )
