"""What the folds say together: the mean of their scores, and the scores of their concatenation."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_dml.data.progress import ProgressLine
from dist_dml.errors import RunError
from dist_dml.protocol_measure import read_embeddings
from dist_dml.retrieval.distances import named_distance, unit_length
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.metrics import summarise
from dist_dml.retrieval.protocol import score_slice

SCORES = ("precision_at_1", "r_precision", "map_at_r")
"""P@1 (which is Recall@1), R-precision and MAP@R of paper C's tables."""
# Student's t at 0.975 by degrees of freedom, 2..30; beyond, the normal distribution's is near.
_T = (4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788)
_T += (2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687)
_T += (2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)
_NORMAL = 1.9600


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (n - 1) and half of the 95% interval of the mean of n values."""

    mean: float
    deviation: float | None
    """None for one value."""
    interval: float | None
    """None for fewer than three values."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of independent values; Student's t for the interval."""
        count = len(values)
        mean = math.fsum(values) / count
        if count < 2:
            return cls(mean, None, None)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
        if count < 3:
            return cls(mean, deviation, None)
        factor = _T[count - 3] if count - 3 < len(_T) else _NORMAL
        return cls(mean, deviation, factor * deviation / math.sqrt(count))


def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
    """The folds' embeddings side by side: each normalised, and the whole normalised again.

    Raises:
        RunError: the folds embedded different images, or gave them other classes.
    """
    first = parts[0]
    for part in parts[1:]:
        if not (np.array_equal(part.ids, first.ids) and np.array_equal(part.labels, first.labels)):
            raise RunError(
                "the folds have embedded different images of the test split: the data have changed "
                "between them, or some could not be read; choose another run.name and run all "
                "folds again"
            )
    vectors = np.concatenate([unit_length(part.vectors) for part in parts], axis=1)
    return Embeddings(unit_length(vectors), first.labels, first.ids)


def concatenated_scores(
    folders: Sequence[Path],
    tests: Sequence[Mapping[str, Any]],
    read: Callable[[Path], Embeddings] = read_embeddings,
) -> dict[str, float]:
    """The scores of the folds' concatenated embeddings, by cosine: 4 x 128-D make 512-D.

    Costs one exact search of the test split with the width of all folds together.

    Args:
        folders: of one repeat's folds, which hold the embeddings.
        tests: their `test.json`.
        read: reads a file of embeddings.
    """
    protocol = tests[0]["protocol"]

    def split(name: str) -> Embeddings:
        parts = zip(folders, tests, strict=True)
        return concatenate([read(path / test["embeddings"][name]) for path, test in parts])

    queries = split(protocol["query"])
    gallery = split(protocol["gallery"]) if protocol["gallery"] else None
    cosine = named_distance("cosine")
    summary = summarise(score_slice(queries, gallery, slice(0, len(queries)), cosine, (1,)))
    return {name: summary[name] for name in SCORES}


def combination_scores(
    folders: Sequence[Path], tests: Sequence[Mapping[str, Any]], num_folds: int
) -> list[dict[str, float]]:
    """The scores of every concatenation that takes each fold from any of the repeats.

    Paper C's `sample_runs.sh` reports their mean: 3 repeats of 4 folds make 81. They share their
    folds, so that their spread is no error of the mean. Costs a search each, and holds all
    embeddings.

    Args:
        folders: of all folds, one repeat after the other.
        tests: their `test.json`.
        num_folds: of a repeat.
    """
    repeats = len(folders) // num_folds
    read = functools.cache(read_embeddings)
    progress = ProgressLine("combinations of repeats", repeats**num_folds, "searches")
    found = []
    for chosen in itertools.product(range(repeats), repeat=num_folds):
        places = [repeat * num_folds + fold for fold, repeat in enumerate(chosen)]
        parts = [folders[place] for place in places], [tests[place] for place in places]
        found.append(concatenated_scores(*parts, read))
        progress.advance(1)
    progress.finish()
    return found


def separated_scores(tests: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of the folds' own scores."""
    return {name: math.fsum(test["scores"][name] for test in tests) / len(tests) for name in SCORES}
