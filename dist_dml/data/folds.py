"""Class-disjoint folds: which training classes a fold trains on and which it validates on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from dist_dml.data.index import Index, JoinedParts
from dist_dml.errors import UsageError

VALIDATION = "validation"
"""The split that a fold adds: the images of the training classes that it holds out."""


def validation_classes(num_classes: int, folds: int, fold: int) -> Int64[np.ndarray, " V"]:
    """The classes of 0..num_classes-1 that a fold validates on, as "A Metric Learning Reality
    Check" divides them (`MLRCSplitManager` of its code; reference 5).

    With C classes in F folds, fold f trains from class floor(f C / F) on, wrapping round, and
    validates on the floor(C / F) classes *before* it: of CUB's 100, fold 0 on 75..99, fold 1 on
    0..24. Where F does not divide C, all folds validate on equally many, and the C mod F classes
    that are left over lie between them: every fold trains on these.
    """
    size = num_classes // folds
    start = fold * num_classes // folds
    return np.sort(np.arange(start - size, start, dtype=np.int64) % num_classes)


def fold_of(index: Index, split: str, folds: int, fold: int) -> Index:
    """An index that trains on one fold's classes and has the split `validation` for the others.

    Training classes keep their order and get the ids 0..n-1, then come the validation classes, and
    the classes that other splits alone have keep their ids. Images that other splits hold of
    validation classes stay where they are: they are images of unknown classes now. Sample ids, and
    with them keys and the quarantine, are the same. Costs a copy of two columns.

    Args:
        index: of one data set.
        split: whose samples are divided, `data.split`.
        folds: how many there are, 2 or more.
        fold: which one, 0..folds-1.

    Raises:
        UsageError: the numbers do not fit, there are fewer classes than folds, a split is called
            `validation` already, or the index is a mixture.
    """
    _check(index, folds, fold)
    held_out = np.zeros(len(index.class_names), bool)
    held_out[validation_classes(index.num_classes, folds, fold)] = True
    num_held_out = int(held_out.sum())
    num_classes = index.num_classes - num_held_out
    # New order of the classes: training, validation, and all others where they were.
    ids = np.arange(len(held_out))
    order = np.argsort(np.where(ids < index.num_classes, held_out, 2), kind="stable")
    new_id = np.empty(len(order), np.int64)
    new_id[order] = np.arange(len(order))
    code = index.split_names.index(split) if len(index.select(split)) else -1
    moved = (index.split == code) & held_out[index.class_id]
    split_names = (*index.split_names, VALIDATION)
    codes = np.where(moved, np.int8(len(split_names) - 1), index.split).astype(np.int8)
    per_split = {name: int(np.sum(codes == i)) for i, name in enumerate(split_names)}
    content = [index.fingerprint, split, folds, fold]
    names = tuple(index.class_names[i] for i in order.tolist())
    return replace(
        index,
        split_names=split_names,
        num_classes=num_classes,
        fingerprint=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        metadata={
            **index.metadata,
            "num_classes": num_classes,
            "split_names": list(split_names),
            "samples_per_split": per_split,
            "fold": {"folds": folds, "fold": fold, "split": split},
        },
        split=codes,
        class_id=new_id[index.class_id],
        # As of a mixture with one part: names from here, keys from the index that was divided.
        joined=JoinedParts(names, ((index, np.arange(len(index), dtype=np.int64)),)),
    )


def _check(index: Index, folds: int, fold: int) -> None:
    if index.part is not None:
        raise UsageError(
            f"data.folds={folds} with data.mixture: folds divide the classes of one data set; "
            "leave one of the two out"
        )
    if folds < 2:
        raise UsageError(f"data.folds={folds}; give 2 or more, or 0 for no folds")
    if not 0 <= fold < folds:
        raise UsageError(f"data.fold={fold} is outside 0..{folds - 1}, the folds of data.folds")
    if index.num_classes < folds:
        raise UsageError(
            f"data.folds={folds}, but {index.folder} has {index.num_classes} training classes; "
            "lower data.folds"
        )
    if VALIDATION in index.split_names:
        raise UsageError(
            f"data.folds={folds} makes a split {VALIDATION!r}, which {index.folder} has already; "
            "set data.folds=0 to train with its own, or rename its shards"
        )
