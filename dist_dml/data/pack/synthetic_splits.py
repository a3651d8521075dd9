"""Which classes and images a synthetic data set has: a pure function of counts and seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Int64

from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of

_MOST_CLASSES = 2**38
"""Class ids and image numbers share one 63-bit position of the random numbers."""
_MOST_IMAGES = 10_000
"""Images of a class in one split."""


@dataclass(frozen=True)
class SyntheticCounts:
    """Classes, and images of each.

    Real data of very many classes have a long tail. Two images of each class alone would teach
    nothing for thousands of steps: until a class comes back, the likelihood of its label is that
    of a guess, 1/C. The frequent classes come back from the first steps on.

    Raises:
        UsageError: names the option that is out of range.
    """

    classes: int
    """Training classes, with the ids 0..classes-1."""
    train_per_class: int = 2
    """Training images of each class that is not frequent."""
    frequent_classes: int = 0
    """Training classes, drawn by the seed, with more images."""
    frequent_per_class: int = 500
    """Training images of each of those."""
    seen_classes: int = 0
    """Training classes, drawn by the seed, with held-out images."""
    seen_per_class: int = 4
    """Held-out images of each of those."""
    test_classes: int = 0
    """Classes that are never trained on; their ids follow those of the training classes."""
    test_per_class: int = 4
    """Images of each of those."""

    def __post_init__(self) -> None:
        if not 2 <= self.classes + self.test_classes <= _MOST_CLASSES or self.classes < 2:
            raise UsageError(f"--classes={self.classes}: expected 2 or more; change it")
        for name in ("frequent_classes", "seen_classes", "test_classes"):
            value = getattr(self, name)
            most = self.classes if name != "test_classes" else _MOST_CLASSES
            if not 0 <= value <= most:
                raise UsageError(f"{_option(name)}={value}: expected 0 to {most}; change it")
        for name in ("train", "frequent", "seen", "test"):
            value = getattr(self, f"{name}_per_class")
            if not 1 <= value <= _MOST_IMAGES:
                raise UsageError(
                    f"{_option(name + '_per_class')}={value}: expected 1 to {_MOST_IMAGES}; "
                    "change it"
                )

    def as_dict(self) -> dict[str, int]:
        """All counts by name."""
        return asdict(self)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def divide(counts: SyntheticCounts, seed: int) -> dict[str, Int64[np.ndarray, "n 2"]]:
    """(class, number within the class and split) of the samples of each split, shuffled.

    No Python object a sample: 16 bytes each.
    """
    training = np.full(counts.classes, counts.train_per_class)
    frequent = _drawn(seed, "frequent", counts.classes, counts.frequent_classes)
    training[frequent] = counts.frequent_per_class
    seen = _drawn(seed, "seen", counts.classes, counts.seen_classes)
    test = counts.classes + np.arange(counts.test_classes)
    sizes = {
        "train": (np.arange(counts.classes), training),
        "seen": (seen, np.full(len(seen), counts.seen_per_class)),
        "test": (test, np.full(len(test), counts.test_per_class)),
    }
    return {
        split: _shuffled(_samples(class_ids, each), seed, split)
        for split, (class_ids, each) in sizes.items()
        if len(class_ids)
    }


def _drawn(seed: int, what: str, num_classes: int, count: int) -> Int64[np.ndarray, " n"]:
    return np.sort(generator(key_of(seed, "synthetic " + what)).permutation(num_classes)[:count])


def _samples(class_ids: np.ndarray, each: np.ndarray) -> Int64[np.ndarray, "n 2"]:
    """`each[i]` samples of class `class_ids[i]`, numbered from 0 in each class."""
    first = np.repeat(np.cumsum(each) - each, each)
    numbers = np.arange(len(first)) - first
    return np.stack([np.repeat(class_ids, each), numbers], axis=1).astype(np.int64)


def _shuffled(samples: np.ndarray, seed: int, split: str) -> np.ndarray:
    return samples[generator(key_of(seed, "synthetic order " + split)).permutation(len(samples))]
