"""Which classes train and which are tested, where the source leaves it open; and what must hold.

Everything drawn is drawn from the seed as `pack folder` draws it: the same classes in the same
order are divided in the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int, Int64

from dist_dml.data.labels import TRAIN
from dist_dml.data.pack.listed_images import note
from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of

SEEN = "seen"
"""Held-out images of training classes."""


def divide(
    class_of: Int[np.ndarray, " n"],
    num_classes: int,
    seed: int,
    test_fraction: float,
    seen_per_class: int,
    where: str,
) -> dict[str, Int64[np.ndarray, " _"]]:
    """The rows of `train`, `seen` and `test`: whole classes are test, few images of others seen.

    Equals the division of `pack folder` for the same images in the same order.

    Args:
        class_of: class of each row, in 0..num_classes-1, numbered by the sorted names.
        num_classes: their number.
        seed: of the division.
        test_fraction: share of the classes that are never trained on.
        seen_per_class: held-out images of a training class, at most a quarter of it.
        where: the source, for messages.

    Returns:
        Row numbers by split, class by class; splits without rows are left out.

    Raises:
        UsageError: `train` or `test` gets no class.
    """
    if not 0 <= test_fraction <= 1:
        raise UsageError(f"--test-fraction={test_fraction}: expected a share in 0..1")
    order = generator(key_of(seed, "pack classes")).permutation(num_classes)
    test = np.zeros(num_classes, bool)
    test[order[: round(test_fraction * num_classes)]] = True
    for name, wanted, count in (
        (TRAIN, test_fraction < 1, int(np.sum(~test))),
        ("test", test_fraction > 0, int(np.sum(test))),
    ):
        if wanted and not count:
            raise UsageError(
                f"{where}: {num_classes} classes leave none for {name}; add classes or change "
                f"--test-fraction={test_fraction}"
            )
    by_class = np.argsort(class_of, kind="stable").astype(np.int64)
    bounds = np.searchsorted(class_of[by_class], np.arange(num_classes + 1))
    seen = np.zeros(len(by_class), bool)
    random = generator(key_of(seed, "pack seen"))
    for number in np.flatnonzero(~test).tolist() if seen_per_class else ():
        start, end = int(bounds[number]), int(bounds[number + 1])
        count = min(seen_per_class, (end - start) // 4)
        seen[start + random.permutation(end - start)[:count]] = True
    tested = test[class_of[by_class]]
    splits = {
        TRAIN: by_class[~tested & ~seen],
        SEEN: by_class[~tested & seen],
        "test": by_class[tested],
    }
    return {name: rows for name, rows in splits.items() if len(rows)}


def check_classes(where: str, classes: Mapping[str, Iterable[str]]) -> None:
    """Refuse splits that share classes in a way their names do not say.

    `seen` and `seen_...` hold images of training classes only; no other split holds any.

    Args:
        where: the source, for messages.
        classes: the labels that occur in each split.

    Raises:
        UsageError: names the first class that stands on the wrong side.
    """
    training = set(classes.get(TRAIN, ()))
    for split, found in classes.items():
        if split == TRAIN or not training:
            continue
        labels = set(found)
        held_out = split == SEEN or split.startswith(SEEN + "_")
        wrong = sorted(labels - training if held_out else labels & training)
        if wrong and held_out:
            raise UsageError(
                f"{where}: split {split} has class {wrong[0]!r}, which is not in train "
                f"({len(wrong):,} such classes); call images of new classes test"
            )
        if wrong:
            raise UsageError(
                f"{where}: class {wrong[0]!r} is in train and in {split} ({len(wrong):,} such "
                f"classes of its {len(labels):,}); held-out images of training classes are called "
                f"seen: rename it (where there is --splits, train=train,{split}=seen)"
            )


def check_counts(
    found: Mapping[str, int], published: Mapping[str, int], strict: bool, where: str
) -> None:
    """Compare counts with the published ones; a difference is a note, or refused if `strict`.

    Args:
        found: what was counted, by what it is (`train images`).
        published: the right numbers of those that are known.
        strict: `--strict-counts`.
        where: the source, for messages.

    Raises:
        UsageError: names the first difference, if `strict`.
    """
    for name, number in published.items():
        if name in found and found[name] != number:
            text = f"{where}: {found[name]:,} {name}, published are {number:,}"
            if strict:
                raise UsageError(f"{text}; complete the source or leave out --strict-counts")
            note(f"{text}; its scores cannot be compared with published ones")


def renamed_splits(text: str, known: Sequence[str], where: str) -> dict[str, str]:
    """What `--splits old=new,old=new` says: the splits that are packed and their names.

    Args:
        text: see above; empty keeps all under their own names.
        known: the splits of the source.
        where: the source, for messages.

    Raises:
        UsageError: it has another form, or names a split that is not there, or one name twice.
    """
    if not text:
        return {name: name for name in known}
    chosen = {}
    for pair in text.split(","):
        old, equals, new = (part.strip() for part in pair.partition("="))
        if not equals or not new.replace("_", "").isalnum() or not new.islower():
            raise UsageError(f"--splits={text}: {pair!r} is not of the form theirs=ours")
        if old not in known:
            raise UsageError(
                f"--splits={text}: {where} has no split {old!r}; it has {', '.join(known)}"
            )
        if new in chosen.values() or old in chosen:
            raise UsageError(f"--splits={text}: {pair!r} repeats a name; each split is one split")
        chosen[old] = new
    return chosen


def add_division_arguments(
    parser: argparse.ArgumentParser, test_fraction: float, seen_per_class: int
) -> None:
    """The arguments of `divide`, with the packer's own defaults."""
    parser.add_argument(
        "--test-fraction", type=float, default=test_fraction, help="share of unseen classes"
    )
    parser.add_argument(
        "--seen-per-class", type=int, default=seen_per_class, help="held-out training images"
    )
