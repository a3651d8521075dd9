"""Scores of parts of the queries: by class, by size of the class, by any column of metadata.

Dimensions: `q` queries.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from dist_dml.errors import UsageError
from dist_dml.retrieval.metrics import QueryScores, reciprocal_ranks


@dataclass(frozen=True)
class GroupScores:
    """Scores of the queries of one group, and where its value stands among the given ones."""

    name: str
    num_queries: int
    num_queries_without_match: int
    """Left out of the means, as everywhere."""
    num_classes: int
    """Classes of all its queries."""
    scores: dict[str, float]
    """Means as named by `summarise`, and `mean_reciprocal_rank` where it is known; F1@1 is one of
    classes and not here. Empty if no query of the group can be answered."""


def scores_by_group(
    queries: QueryScores,
    group_of_query: Shaped[np.ndarray, " q"] | Sequence[object],
    names: Mapping[int, str] | Sequence[str] | None = None,
) -> list[GroupScores]:
    """The scores of each group, ordered by the groups' values.

    The mean of a score over groups, weighted by their answerable queries, is the score of all.
    Costs a sort of the queries, for any number of groups.

    Args:
        queries: of all queries.
        group_of_query: what the queries are grouped by: numbers, texts, or values of a column; None
            and NaN make one group, `(missing)`, which comes last.
        names: from numbers to names, where the groups are numbers; otherwise the values are names.

    Raises:
        UsageError: if there is not one value a query.
    """
    values = list(group_of_query)
    if len(values) != len(queries.query_label):
        raise UsageError(
            f"{len(values)} values of a column do not group {len(queries.query_label)} queries; "
            "give one for each query, in their order"
        )
    group, labels = _numbered(values, names)
    count = len(labels)
    kept = queries.has_match
    place = group[kept]
    answered = np.bincount(place, minlength=count)
    columns = _columns(queries)
    sums = {
        name: np.bincount(place, column[kept], minlength=count) for name, column in columns.items()
    }
    every = np.bincount(group, minlength=count)
    pairs = np.unique(np.stack([group, queries.query_label]), axis=1)
    classes = np.bincount(pairs[0], minlength=count)
    return [
        GroupScores(
            name=labels[i],
            num_queries=int(every[i]),
            num_queries_without_match=int(every[i] - answered[i]),
            num_classes=int(classes[i]),
            scores={key: float(total[i] / answered[i]) for key, total in sums.items()}
            if answered[i]
            else {},
        )
        for i in range(count)
    ]


def _columns(queries: QueryScores) -> dict[str, Float64[np.ndarray, " q"]]:
    columns = {
        f"recall_at_{k}": queries.recall_hits[:, i].astype(np.float64)
        for i, k in enumerate(queries.recall_at)
    }
    for name in ("precision_at_1", "r_precision", "map_at_r"):
        columns[name] = getattr(queries, name)
    if bool((queries.first_hit_rank[queries.has_match] > 0).all()):
        columns["mean_reciprocal_rank"] = reciprocal_ranks(queries)
    return columns


def _numbered(
    values: list[object], names: Mapping[int, str] | Sequence[str] | None
) -> tuple[Int64[np.ndarray, " q"], list[str]]:
    """A number for each value, 0 and up in the order of the values, and the names of the numbers.

    Python's own types decide the order; values of several types, as in a column of mixed ones, are
    ordered as texts.
    """
    plain = [_plain(value) for value in values]
    present = {value for value in plain if value is not None and value == value}
    try:
        ordered: list[object] = sorted(present)  # pyright: ignore[reportArgumentType]
    except TypeError:
        ordered = sorted(present, key=lambda value: (type(value).__name__, str(value)))
    number = {value: i for i, value in enumerate(ordered)}
    group = np.array([number.get(value, len(ordered)) for value in plain], dtype=np.int64)
    labels = [_name(value, names) for value in ordered]
    return group, labels + ["(missing)"] * bool((group == len(ordered)).any())


def _plain(value: object) -> Hashable:
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, Hashable) else str(value)


def _name(value: object, names: Mapping[int, str] | Sequence[str] | None) -> str:
    if names is None or not isinstance(value, int):
        return str(value)
    if isinstance(names, Mapping):
        return names.get(value, str(value))
    return names[value] if 0 <= value < len(names) else str(value)


def scores_by_class(
    queries: QueryScores, names: Mapping[int, str] | Sequence[str] | None = None
) -> list[GroupScores]:
    """`scores_by_group` by the queries' labels."""
    return scores_by_group(queries, queries.query_label, names)


def scores_by_class_size(queries: QueryScores, sizes: Int64[np.ndarray, " q"]) -> list[GroupScores]:
    """`scores_by_group` by powers of 2 of the class's size: `1`, `2-3`, `4-7`, `8-15`, ...

    Args:
        queries: of all queries.
        sizes: as from `class_sizes`; or those of the training set, for a closed set.

    Raises:
        UsageError: if a size is below 0, or there is not one a query.
    """
    if sizes.min(initial=0) < 0:
        raise UsageError(f"a class size is {sizes.min()}; give numbers of images, 0 and above")
    # Bits of a number: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7.
    bits = np.frexp(sizes.astype(np.float64))[1].astype(np.int64)
    names = ["0", "1", *[f"{2**bit}-{2 ** (bit + 1) - 1}" for bit in range(1, 63)]]
    return scores_by_group(queries, bits, names)


def class_sizes(
    labels: Int64[np.ndarray, " q"], of_gallery: Int64[np.ndarray, " g"] | None = None
) -> Int64[np.ndarray, " q"]:
    """Gallery items of each query's class, the query itself among them if it is one.

    Args:
        labels: of the queries.
        of_gallery: labels of the gallery's items; None: the queries are searched.
    """
    classes, counts = np.unique(labels if of_gallery is None else of_gallery, return_counts=True)
    place = np.searchsorted(classes, labels).clip(max=len(classes) - 1)
    return np.where(classes[place] == labels, counts[place], 0)
