"""Is the difference of two runs more than the luck of these classes?

The runs answered the same queries. Queries of one class share their fate, so whole classes are what
is drawn: a test that shuffles single queries finds significance where there is none.

Dimensions: `q` queries, `c` classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64, Int64

from dist_dml.errors import UsageError
from dist_dml.keyed_random import generator, key_of

DRAWS = 10_000
CONFIDENCE = 0.95
MOST_EXACT_CLASSES = 13
_BLOCK_NUMBERS = 2**22
_MOST_NUMBERS = 2 * 10**8


@dataclass(frozen=True)
class PairedTest:
    """The second run against the first."""

    difference: float
    """Mean of the second's scores less the first's, over the queries."""
    low: float
    high: float
    """95% interval of the difference, by bootstrap over classes."""
    p: float
    """How likely a difference of at least this size is, if the runs were alike."""
    num_queries: int
    num_classes: int
    is_exact: bool
    """Whether every way to swap the runs was counted, not a sample of them."""


def paired_test(
    first: Float[np.ndarray, " q"],
    second: Float[np.ndarray, " _"],
    labels: Int64[np.ndarray, " _"],
    seed: int = 0,
    draws: int = DRAWS,
) -> PairedTest:
    """Two-sided permutation test of the mean difference, over classes.

    If it does not matter which run answered, the two may be swapped within any class: the sum of a
    class's differences is as likely to have the other sign. p is the share of all such swaps whose
    difference is at least as large; up to 13 classes that differ all 2^c are counted, beyond them
    (1 + number of `draws` that are) / (1 + `draws`), which is never 0. The interval is the middle
    95% of the differences of classes drawn with replacement. Costs `draws` * c additions: 0.5 s at
    10,000 classes; beyond 20,000 classes fewer are drawn, at least 1,000.

    Args:
        first: scores of the queries by one run.
        second: of the same queries by the other.
        labels: the queries' classes.
        seed: of the draws.
        draws: how many.

    Raises:
        UsageError: if there is no query, or the arrays do not fit together.
    """
    if not len(first) or not len(first) == len(second) == len(labels):
        raise UsageError(
            f"a paired test got {len(first)} and {len(second)} scores of {len(labels)} queries; "
            "give both runs' scores of the same queries"
        )
    difference = second.astype(np.float64) - first.astype(np.float64)
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.bincount(place, difference, len(counts))
    draws = max(min(draws, 1000), min(draws, _MOST_NUMBERS // len(counts)))
    p, is_exact = _swaps(sums, generator(key_of(seed, "paired permutation")), draws)
    drawn = _bootstrap(sums, counts, generator(key_of(seed, "paired bootstrap")), draws)
    low, high = np.quantile(drawn, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    mean = float(difference.mean())
    return PairedTest(mean, float(low), float(high), p, len(first), len(counts), is_exact)


def _swaps(
    sums: Float64[np.ndarray, " c"], draw: np.random.Generator, draws: int
) -> tuple[float, bool]:
    sums = sums[sums != 0]  # Swapping these changes nothing.
    # Sums of floats in another order differ in their last bits, and are the same swap.
    least = abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    if len(sums) <= MOST_EXACT_CLASSES:
        bits = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        signs = 1.0 - 2.0 * bits
        return float((np.abs(signs @ sums) >= least).mean()) if len(sums) else 1.0, True
    reached = 0
    block = max(1, _BLOCK_NUMBERS // len(sums))
    for start in range(0, draws, block):
        shape = (min(block, draws - start), len(sums))
        signs = draw.integers(0, 2, shape, dtype=np.int8).astype(np.float32) * 2 - 1
        reached += int((np.abs(signs @ sums) >= least).sum())
    return (1 + reached) / (1 + draws), False


def _bootstrap(
    sums: Float64[np.ndarray, " c"],
    counts: Int64[np.ndarray, " c"],
    draw: np.random.Generator,
    draws: int,
) -> Float64[np.ndarray, " n"]:
    found = []
    block = max(1, _BLOCK_NUMBERS // len(sums))
    for start in range(0, draws, block):
        chosen = draw.integers(0, len(sums), (min(block, draws - start), len(sums)))
        found.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    return np.concatenate(found)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values that may be read together: Holm's, each at least as large as it was, at most 1.

    Whoever tests twenty pairs finds one "significant" at 5% by luck alone.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return adjusted
