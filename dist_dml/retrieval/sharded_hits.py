"""The rank of every first hit in a gallery that is divided among the workers.

What `first_hits.py` finds in one process: queries whose first hit stands behind the searched
neighbours travel to all workers; each finds its nearest item of their class, all agree on the
nearest of all, and each counts its own items that are nearer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float64, Int64

from dist_dml.parallel.collectives import ProcessGroup, gather_equal, gather_objects
from dist_dml.retrieval.distances import Distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.exact_values import as_tensor
from dist_dml.retrieval.first_hits import (
    NO_ID,
    Asked,
    Held,
    check_scored,
    count_nearer,
    nearest_own,
    without_hit,
)
from dist_dml.retrieval.metrics import QueryScores
from dist_dml.retrieval.sharded_gallery import gather_rows, return_answers

_QUERIES_AT_A_TIME = 4096
"""Of all workers together."""


def complete_sharded_hits(
    scores: QueryScores,
    queries: Embeddings,
    gallery: Embeddings | None,
    distance: Distance,
    group: ProcessGroup | None,
    device: torch.device | None = None,
) -> QueryScores:
    """`scores` with `first_hit_rank` of every query of this worker that has a match.

    Called by all workers. Equals `first_hits.complete_first_hits` against the whole gallery. Costs
    2*D operations for each such query of all workers and each item of this one, and the travel of
    these queries.

    Args:
        scores: of exactly these queries, by `sharded_gallery.score_sharded`.
        queries: this worker's.
        gallery: this worker's part of what was searched; None: all workers' queries.
        distance: one of embeddings, by which the neighbours were searched.
        group: the workers, or None for one process.
        device: where the group's collectives read; None for main memory.

    Raises:
        UsageError: if `scores` are of other queries.
    """
    check_scored(scores, queries)
    gallery = queries if gallery is None else gallery
    missed = without_hit(scores)
    counts = gather_objects(len(missed), group)
    if not any(counts):
        return scores
    held = Held.of(gallery, distance)
    searched = max(scores.recall_at, default=0)
    rank = scores.first_hit_rank.copy()
    step = max(1, _QUERIES_AT_A_TIME // len(counts))
    for start in range(0, max(counts), step):
        sizes = tuple(max(0, min(step, count - start)) for count in counts)
        mine = missed[start : start + step]
        own = Asked.of(queries.rows(mine), distance)
        asked = Asked(
            gather_rows(own.vectors, sizes, group, device),
            gather_rows(own.labels, sizes, group, device),
            gather_rows(own.ids, sizes, group, device),
            distance,
        )
        agreed = _nearest_of_all(asked, held, group, device)
        nearer = np.zeros(len(asked.ids), dtype=np.int64)
        if len(gallery):
            nearer = count_nearer(asked, held, *agreed)
        found = 1 + return_answers(nearer, sizes, group, device).sum(axis=0)
        rank[mine] = np.maximum(found, searched + 1)
    return replace(scores, first_hit_rank=rank)


def _nearest_of_all(
    asked: Asked, held: Held, group: ProcessGroup | None, device: torch.device | None
) -> tuple[Float64[np.ndarray, " q"], Int64[np.ndarray, " q"]]:
    """`nearest_own` in the galleries of all workers together."""
    nearest, ids = np.full(len(asked.ids), np.inf), np.full(len(asked.ids), NO_ID)
    if len(held.items):
        nearest, ids = nearest_own(asked, held)
    where = device or "cpu"
    every = gather_equal(as_tensor(nearest).to(where), group).cpu().numpy()
    every_id = gather_equal(as_tensor(ids).to(where), group).cpu().numpy()
    least = every.min(axis=0)
    return least, np.where(every == least, every_id, NO_ID).min(axis=0)
