"""A gallery that is divided among the workers: its parts stay, blocks of queries travel.

Each worker holds some gallery items and some queries. Blocks of all workers' queries are gathered,
every worker finds their nearest among its own items, and what it found goes back to the workers
whose queries they are, who merge. Nobody ever holds another worker's items. Values are exact
(`exact_values.py`), so the result is that of one process with the whole gallery, to the bit.

Dimensions: `q` queries of this worker, `b` of a block, `g` gallery items of this worker, width `D`,
`k` neighbours, W workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64

from dist_dml.errors import UsageError
from dist_dml.parallel.collectives import (
    ProcessGroup,
    gather_objects,
    gather_uneven,
    return_rows,
)
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings, check_space
from dist_dml.retrieval.exact_values import as_tensor, merge_nearest
from dist_dml.retrieval.gallery_search import DEFAULT, GallerySearch, SearchSettings, open_gallery
from dist_dml.retrieval.metrics import NO_LABEL, QueryScores, score_queries
from dist_dml.retrieval.neighbours import block_rows


@dataclass(frozen=True)
class FoundBlock:
    """Neighbours of some of this worker's queries, nearest first."""

    rows: slice
    """Of this worker's queries."""
    ids: Int64[np.ndarray, "b k"]
    """Of the gallery items; -1 where there is no neighbour."""
    labels: Int64[np.ndarray, "b k"]
    """Of the items; -1 where there is no neighbour."""
    values: Float64[np.ndarray, "b k"]


def sharded_blocks(
    queries: Embeddings,
    gallery: Embeddings,
    k: int,
    distance: Distance,
    group: ProcessGroup | None,
    settings: SearchSettings = DEFAULT,
) -> Iterator[FoundBlock]:
    """The `k` items nearest to each query of this worker, in all workers' galleries together.

    Called by all workers with the same k, distance and memory. Each item of the gallery stands on
    one worker; a query never finds the item of its own id, wherever that stands. A block costs a
    gather of the queries and an all-to-all of 24 W k bytes for each of this worker's queries.

    Args:
        queries: this worker's; may be none.
        gallery: this worker's items; may be none where another worker has some.
        k: neighbours wanted; where fewer remain, -1 and the farthest value.
        distance: one of embeddings.
        group: the workers, or None for one process.
        settings: who searches, in how much memory of each worker, and where; the group's
            collectives read from the same device.

    Yields:
        Blocks of this worker's queries in order. Every worker takes part in as many rounds.

    Raises:
        UsageError: on every worker, if widths differ, the gallery is empty, or the distance is not
            one of embeddings.
    """
    every = _agree(queries, gallery, k, distance, group)
    squares = not distance.larger_is_nearer
    search = None
    if len(gallery):
        prepared = np.ascontiguousarray(distance.prepare(gallery.vectors))
        search = open_gallery(prepared, gallery.ids, squares, settings)
    workers = 1 if group is None else group.size()
    # A round's queries of all workers are answered here, and come back from all.
    step = max(1, block_rows(k, settings.memory_bytes) // workers)
    rank = 0 if group is None else group.rank()
    for start in range(0, max(every), step):
        counts = tuple(max(0, min(step, count - start)) for count in every)
        mine = slice(start, start + counts[rank])
        asked = gather_rows(distance.prepare(queries.vectors[mine]), counts, group, settings.device)
        asked_ids = gather_rows(queries.ids[mine], counts, group, settings.device)
        answer = _answer(search, gallery, asked, asked_ids, k, squares)
        values, ids, labels = (
            return_answers(part, counts, group, settings.device) for part in answer
        )
        # Labels stand where merge_nearest has positions: both are -1 where there is nothing.
        merged = merge_nearest(list(values), list(ids), list(labels), k, squares)
        ids = np.where(merged[2] >= 0, merged[1], -1)
        yield FoundBlock(mine, ids, merged[2], merged[0])


def score_sharded(
    queries: Embeddings,
    gallery: Embeddings | None,
    distance: Distance,
    recall_at: Sequence[int],
    group: ProcessGroup | None,
    settings: SearchSettings = DEFAULT,
) -> QueryScores:
    """Scores of this worker's queries against the galleries of all workers.

    `QueryScores.concatenate` in worker order equals `protocol.score_slice` of all queries against
    the whole gallery in one process.

    Args:
        queries: this worker's.
        gallery: this worker's part of what is searched; None searches all workers' queries.
        distance: one of embeddings.
        recall_at: the K of Recall@K.
        group: the workers, or None for one process.
        settings: see `sharded_blocks`.

    Raises:
        UsageError: as `sharded_blocks`, or if an id has two labels or stands twice.
    """
    gallery = queries if gallery is None else gallery
    counts = _relevant_counts(queries, gallery, group, settings.device)
    most = max(gather_objects(int(counts.max(initial=0)), group))
    k = max(most, *recall_at, 1)
    nothing = np.empty((0, k), dtype=np.int64)
    parts = [score_queries(nothing, queries.labels[:0], counts[:0], recall_at)]
    blocks = sharded_blocks(queries, gallery, k, distance, group, settings)
    for block in blocks:
        labels = np.where(block.ids < 0, NO_LABEL, block.labels)
        own = queries.labels[block.rows]
        parts.append(score_queries(labels, own, counts[block.rows], recall_at))
    return QueryScores.concatenate(parts)


def gather_rows(
    rows: np.ndarray,
    counts: tuple[int, ...],
    group: ProcessGroup | None,
    device: torch.device | None,
) -> np.ndarray:
    """All workers' rows, in worker order; they travel from where the group's collectives read."""
    sent = as_tensor(rows).to(device or "cpu")
    return gather_uneven(sent, counts, group).cpu().numpy()


def return_answers(
    values: np.ndarray,
    counts: tuple[int, ...],
    group: ProcessGroup | None,
    device: torch.device | None,
) -> np.ndarray:
    """What every worker, in worker order, answers of this worker's rows; see `return_rows`."""
    sent = as_tensor(values).to(device or "cpu")
    return return_rows(sent, counts, group).cpu().numpy()


def _answer(
    search: GallerySearch | None,
    gallery: Embeddings,
    asked: np.ndarray,
    asked_ids: np.ndarray,
    k: int,
    squares: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, ids and labels of the nearest among this worker's items; labels -1 for none."""
    if search is None:
        far = np.inf if squares else -np.inf
        none = np.full((len(asked), k), -1, dtype=np.int64)
        return np.full((len(asked), k), far), none, none
    positions, values = search.nearest(asked, asked_ids, k)
    found = positions >= 0
    ids = np.where(found, gallery.ids[positions], -1)
    return values, ids, np.where(found, gallery.labels[positions], -1)


def _agree(
    queries: Embeddings,
    gallery: Embeddings,
    k: int,
    distance: Distance,
    group: ProcessGroup | None,
) -> list[int]:
    """Every worker's number of queries, once all workers can begin."""
    if distance.space != "embedding":
        raise UsageError(f"{distance.name} is not one of embeddings; gather them and use nearest")
    check_space(queries, distance)
    facts = gather_objects(
        (len(queries), len(gallery), queries.vectors.shape[1], gallery.vectors.shape[1]), group
    )
    widths = {fact[2] for fact in facts if fact[0]} | {fact[3] for fact in facts if fact[1]}
    if len(widths) > 1:
        raise UsageError(
            f"queries and galleries of the workers are {sorted(widths)} wide; embed all with the "
            "same model"
        )
    items = sum(fact[1] for fact in facts)
    if k < 1 or items == 0:
        raise UsageError(
            f"cannot find k={k} neighbours among {items} items; k and the gallery must be at "
            "least 1"
        )
    return [fact[0] for fact in facts]


def _relevant_counts(
    queries: Embeddings,
    gallery: Embeddings,
    group: ProcessGroup | None,
    device: torch.device | None,
) -> Int64[np.ndarray, " q"]:
    """`R` of each query of this worker: items of its class on all workers, itself apart."""
    every = gather_objects(np.unique(gallery.labels, return_counts=True), group)
    classes, place = np.unique(np.concatenate([part[0] for part in every]), return_inverse=True)
    totals = np.bincount(place, np.concatenate([part[1] for part in every]), len(classes))
    at = np.searchsorted(classes, queries.labels).clip(max=max(len(classes) - 1, 0))
    of_class = np.zeros(len(queries), dtype=np.int64)
    if len(classes):
        of_class = np.where(classes[at] == queries.labels, totals[at], 0).astype(np.int64)
    return of_class - _itself(queries, gallery, group, device)


def _itself(
    queries: Embeddings,
    gallery: Embeddings,
    group: ProcessGroup | None,
    device: torch.device | None,
) -> Int64[np.ndarray, " q"]:
    """1 for each query whose id some worker's gallery holds."""
    order = np.argsort(gallery.ids, kind="stable")
    known_ids, known_labels = gallery.ids[order], gallery.labels[order]
    counts = gather_objects(len(queries), group)
    asked = gather_rows(
        np.stack([queries.ids, queries.labels], axis=1), tuple(counts), group, device
    )
    here = np.zeros(len(asked), dtype=np.int64)
    trouble = ""
    if len(known_ids):
        at = np.searchsorted(known_ids, asked[:, 0]).clip(max=len(known_ids) - 1)
        here = (known_ids[at] == asked[:, 0]).astype(np.int64)
        other = here.astype(bool) & (known_labels[at] != asked[:, 1])
        if other.any():
            row = int(other.argmax())
            trouble = (
                f"id {asked[row, 0]} has label {asked[row, 1]} among the queries and "
                f"{known_labels[at[row]]} in the gallery; number the samples of both together"
            )
        twice = np.flatnonzero(np.diff(known_ids) == 0)
        if len(twice):
            trouble = f"gallery id {known_ids[twice[0]]} stands twice; ids must be unique"
    _refuse(trouble, group)
    found = return_answers(here, tuple(counts), group, device).sum(axis=0)
    trouble = ""
    if found.max(initial=0) > 1:
        row = int(found.argmax())
        trouble = (
            f"id {queries.ids[row]} stands in the galleries of {found[row]} workers; each item "
            "belongs to one"
        )
    _refuse(trouble, group)
    return found


def _refuse(trouble: str, group: ProcessGroup | None) -> None:
    """All workers raise what any of them has found."""
    for text in gather_objects(trouble, group):
        if text:
            raise UsageError(text)
