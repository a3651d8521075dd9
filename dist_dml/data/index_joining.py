"""Several data sets as one index, for training on a mixture of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int64

from dist_dml.data.index import Index, JoinedParts
from dist_dml.data.shard_changes import is_url
from dist_dml.errors import UsageError

MAX_PARTS = 127
"""Of the type of the column `part`."""


def join_indexes(parts: Sequence[tuple[Index, str]], classes: Literal["own", "by_name"]) -> Index:
    """One index over all samples of the first data set and the named split of the others.

    The samples of the first keep their ids, and those of the others follow; all that are trained on
    have the first's split. Its training classes keep their ids, then come the training classes of
    the others, then what only the first's other splits have. Costs a copy of all columns.

    Args:
        parts: each data set with its split to train on, the main one first.
        classes: `own` makes the classes of different data sets different ones, whatever they are
            called; `by_name` makes equal names the same class.

    Returns:
        With one part, its index as it is.

    Raises:
        UsageError: a split is missing, there are more than 127 data sets, or a class that the first
            data set holds out would be trained on under `by_name`.
    """
    assert parts, "a mixture has at least one part"
    if len(parts) == 1:
        return parts[0][0]
    if len(parts) > MAX_PARTS:
        raise UsageError(f"data.mixture: {len(parts)} data sets, {MAX_PARTS} at most; pack some")
    first, split = parts[0]
    chosen = [np.arange(len(first)), *(index.select(name) for index, name in parts[1:])]
    code = first.split_names.index(split) if len(first.select(split)) else -1
    counts = [len(ids) for ids in chosen]
    names, class_ids, num_classes = _classes(parts, chosen, classes)
    starts = np.cumsum([0, *(len(index.shards) for index, _ in parts[:-1])])

    def column(name: str) -> np.ndarray:
        found = [getattr(i, name)[ids] for (i, _), ids in zip(parts, chosen, strict=True)]
        return np.concatenate(found)

    splits = [first.split, *(np.full(count, code, np.int8) for count in counts[1:])]
    shards = [
        index.shard[ids] + np.int32(start)
        for (index, _), ids, start in zip(parts, chosen, starts, strict=True)
    ]
    return Index(
        folder=first.folder,
        shards=tuple(_absolute(index, i) for index, _ in parts for i in range(len(index.shards))),
        split_names=first.split_names,
        num_classes=num_classes,
        fingerprint=_fingerprint(parts, classes),
        metadata=_metadata(parts, counts, num_classes, len(names)),
        split=np.concatenate(splits),
        class_id=np.concatenate(class_ids),
        shard=np.concatenate(shards),
        offset=column("offset"),
        size=column("size"),
        extension=column("extension"),
        checksum=column("checksum"),
        part=np.repeat(np.arange(len(parts), dtype=np.int8), counts),
        quarantined=first.quarantined,
        joined=JoinedParts(
            names, tuple((index, ids) for (index, _), ids in zip(parts, chosen, strict=True))
        ),
    )


def _classes(
    parts: Sequence[tuple[Index, str]],
    chosen: Sequence[Int64[np.ndarray, " _"]],
    classes: Literal["own", "by_name"],
) -> tuple[tuple[str, ...], list[Int64[np.ndarray, " _"]], int]:
    """Names by new class id, the new class of every sample of each part, and training classes."""
    first = parts[0][0]
    names = list(first.class_names[: first.num_classes])
    held_out = first.class_names[first.num_classes :]
    known = {name: i for i, name in enumerate(names)} if classes == "by_name" else {}
    hidden = set(held_out) if classes == "by_name" else set()
    class_ids: list[Int64[np.ndarray, " _"]] = []
    for (index, split), ids in zip(parts[1:], chosen[1:], strict=True):
        old = index.class_id[ids]
        # A training split may lack some of its classes, which the catalogue has all the same.
        whole = bool((old < index.num_classes).all())
        taken = np.arange(index.num_classes) if whole else np.unique(old)
        new = np.full(len(index.class_names), -1, np.int64)
        for class_id in taken.tolist():
            name = index.class_names[class_id]
            if name in hidden:
                raise UsageError(
                    f"data.mixture: class {name!r} of {index.folder}, split {split!r}, is held out "
                    f"of training in {first.folder}; set data.mixture_classes=own, or leave it out"
                )
            if name in known:
                new[class_id] = known[name]
                continue
            new[class_id] = len(names)
            if classes == "by_name":
                known[name] = len(names)
            names.append(name)
        class_ids.append(new[old])
    num_classes = len(names)
    moved = first.class_id + np.where(
        first.class_id >= first.num_classes, num_classes - first.num_classes, 0
    )
    return (*names, *held_out), [moved, *class_ids], num_classes


def _absolute(index: Index, shard: int) -> str:
    location = index.shard_location(shard)
    return location if is_url(location) else str((index.folder / location).absolute())


def _fingerprint(parts: Sequence[tuple[Index, str]], classes: str) -> str:
    """Changes with the fingerprint and the split of any part, their order, and `classes`."""
    content = [classes, *([index.fingerprint, split] for index, split in parts)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _metadata(
    parts: Sequence[tuple[Index, str]], counts: Sequence[int], num_classes: int, num_names: int
) -> dict[str, object]:
    """That of the first data set with the mixture's counts, in the form of `dataset.json`."""
    first, split = parts[0]
    per_split = dict(first.metadata["samples_per_split"])
    per_split[split] += sum(counts[1:])
    return {
        **first.metadata,
        "num_classes": num_classes,
        "num_classes_all": num_names,
        "num_samples": sum(counts),
        "samples_per_split": per_split,
        "shards": [
            {**record, "name": _absolute(index, i)}
            for index, _ in parts
            for i, record in enumerate(index.metadata["shards"])
        ],
        "mixture": [
            {"folder": str(index.folder), "split": name, "fingerprint": index.fingerprint}
            for index, name in parts
        ],
    }
