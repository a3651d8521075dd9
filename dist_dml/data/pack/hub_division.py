"""Which images of a Hugging Face image set train: by its own splits, or by whole classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dist_dml.data.labels import TRAIN
from dist_dml.data.pack.division import SEEN, check_classes, divide
from dist_dml.data.pack.hub_files import Unit
from dist_dml.data.pack.listed_images import note

RULES = ("auto", "own", "classes")


@dataclass(frozen=True)
class HubDivision:
    """How the images are divided.

    Attributes:
        seed: of division and order.
        rule: `own` keeps the source's splits, `classes` divides all images by class, `auto` takes
            `own` where there are several splits or `splits` names some.
        splits: `theirs=ours,...`: the splits that are packed; empty takes all.
        test_fraction: share of the classes that are `test` when they are divided by class.
        seen_per_class: held-out images of a training class, likewise.
    """

    seed: int = 0
    rule: str = "auto"
    splits: str = ""
    test_fraction: float = 0.5
    seen_per_class: int = 2


def divided(
    where: str,
    units: Sequence[Unit],
    rows: np.ndarray,
    labels: Sequence[str],
    names: Mapping[str, str],
    division: HubDivision,
) -> dict[str, np.ndarray]:
    """The rows by split of the new data set.

    Args:
        where: the source, for messages.
        units: where the rows come from.
        rows: with `unit` and `label`, a position in `labels`.
        labels: sorted.
        names: our names of the source's splits that are packed.
        division: see `HubDivision`.

    Raises:
        UsageError: `divide` or `check_classes` refuses.
    """
    by_class = division.rule == "classes" or (
        division.rule == "auto" and len(names) == 1 and not division.splits
    )
    if by_class:
        chosen = divide(
            rows["label"],
            len(labels),
            division.seed,
            division.test_fraction,
            division.seen_per_class,
            where,
        )
        return {name: rows[numbers] for name, numbers in chosen.items()}
    known = list(names)
    theirs = np.array([known.index(unit.split) for unit in units])[rows["unit"]]
    sides = {old: rows[theirs == code] for code, old in enumerate(names)}
    classes = {old: np.unique(side["label"]).tolist() for old, side in sides.items()}
    ours = dict(names) if division.splits else _own_names(classes)
    found = {ours[old]: {str(labels[i]) for i in ids} for old, ids in classes.items()}
    check_classes(where, found)
    return {ours[old]: side for old, side in sides.items() if len(side)}


def _own_names(classes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Our names of the source's splits: images of training classes only are `seen`."""
    training = set(classes.get(TRAIN, ()))
    ours: dict[str, str] = {}
    for old in sorted(classes, key=lambda name: (name != TRAIN, name != "test", name)):
        plain = "".join(c if c.isalnum() else "_" for c in old.lower())
        new = "val" if plain in ("validation", "valid", "dev") else plain
        if training and old != TRAIN and set(classes[old]) <= training:
            new = f"{SEEN}_{new}" if SEEN in ours.values() else SEEN
            note(f"split {old} holds images of training classes only and is called {new}")
        ours[old] = new
    return {old: ours[old] for old in classes}
