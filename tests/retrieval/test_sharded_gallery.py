"""A gallery divided among workers answers like one process that has all of it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from worker_group import WorkerFailed, run_workers

from dist_dml.retrieval.distances import DISTANCES
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.first_hits import complete_first_hits
from dist_dml.retrieval.gallery_search import SearchSettings
from dist_dml.retrieval.metrics import QueryScores, summarise
from dist_dml.retrieval.protocol import score_slice
from dist_dml.retrieval.ranking import nearest
from dist_dml.retrieval.sharded_gallery import score_sharded, sharded_blocks
from dist_dml.retrieval.sharded_hits import complete_sharded_hits

SETTINGS = SearchSettings(memory_bytes=2**17)
"""So little that several rounds are needed."""


def samples(seed: int = 0, count: int = 400) -> Embeddings:
    """Every tenth point stands twice, so that equal values come from different workers."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, 12)).astype(np.float32)
    vectors[::10] = vectors[5::10]
    labels = rng.integers(0, 40, count)
    return Embeddings(vectors, labels, rng.permutation(count).astype(np.int64))


def share(whole: Embeddings, rank: int, num_workers: int) -> Embeddings:
    """Uneven parts; the last of three workers has nothing."""
    cuts = {1: [0, 400], 2: [0, 111, 400], 3: [0, 290, 400, 400]}[num_workers]
    return whole.rows(slice(cuts[rank], cuts[rank + 1]))


def search(rank, num_workers, group, name, k):
    gallery = share(samples(), rank, num_workers)
    queries = gallery.rows(slice(None, None, -1)) if rank else gallery
    blocks = list(sharded_blocks(queries, gallery, k, DISTANCES[name], group, SETTINGS))
    columns = ("ids", "labels", "values")
    found = [np.concatenate([getattr(block, column) for block in blocks]) for column in columns]
    return queries.ids, *found, len(blocks)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_division_finds_the_neighbours_of_one_process(tmp_path, num_workers):
    whole = samples()
    for name in ("cosine", "l2"):
        results = run_workers(search, num_workers, tmp_path, name, 25)
        positions, values = nearest(whole, whole, 25, DISTANCES[name])
        expected = dict(zip(whole.ids.tolist(), zip(positions, values, strict=True), strict=True))
        seen = 0
        for query_ids, ids, labels, found, rounds in results:
            assert rounds == results[0][-1] > 1
            for row, query in enumerate(query_ids.tolist()):
                place, value = expected[query]
                np.testing.assert_array_equal(ids[row], whole.ids[place])
                np.testing.assert_array_equal(labels[row], whole.labels[place])
                np.testing.assert_array_equal(found[row].astype(np.float32), value)
                seen += 1
        assert seen == 400


def score(rank, num_workers, group, other_gallery):
    queries = share(samples(), rank, num_workers)
    gallery = None
    if other_gallery:
        # Half of the queries stand in the gallery as well, on another worker.
        half = samples().rows(np.arange(0, 400, 2))
        gallery = half.rows(np.arange(len(half)) % num_workers == (rank + 1) % num_workers)
    return score_sharded(queries, gallery, DISTANCES["cosine"], (1, 3), group, SETTINGS)


@pytest.mark.parametrize("other_gallery", [False, True])
def test_scores_of_a_divided_gallery_are_those_of_one_process(tmp_path, other_gallery):
    whole = samples()
    gallery = whole.rows(np.arange(0, 400, 2)) if other_gallery else None
    expected = score_slice(whole, gallery, slice(0, 400), DISTANCES["cosine"], (1, 3))
    for num_workers in (1, 3):
        parts = run_workers(score, num_workers, tmp_path, other_gallery)
        found = QueryScores.concatenate(parts)
        for name in ("recall_hits", "map_at_r", "r_precision", "nearest_label", "has_match"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        assert summarise(found) == summarise(expected)


def refused(rank, num_workers, group, fault):
    whole = samples(count=400)
    gallery = share(whole, rank, num_workers)
    queries = gallery
    if fault == "twice" and rank == 0:
        gallery = whole.rows(np.arange(200))  # Also the first ones of worker 1.
    if fault == "label" and rank == 1:
        queries = Embeddings(queries.vectors, queries.labels + 1, queries.ids)
    if fault == "width" and rank == 1:
        queries = Embeddings(queries.vectors[:, :5], queries.labels, queries.ids)
    if fault == "empty":
        gallery = whole.rows(np.arange(0))
    try:
        score_sharded(queries, gallery, DISTANCES["l2"], (1,), group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("twice", "stands in the galleries of 2 workers; each item belongs to one"),
        ("label", "number the samples of both together"),
        ("width", r"are \[5, 12\] wide; embed all with the same model"),
        ("empty", "neighbours among 0 items"),
    ],
)
def test_every_worker_refuses_what_one_of_them_has(tmp_path, fault, words):
    try:
        messages = run_workers(refused, 2, tmp_path, fault, timeout_seconds=30)
    except WorkerFailed as failure:
        pytest.fail(f"a worker was left behind: {failure}")
    for message in messages:
        assert message.startswith("UsageError: ")
        assert re.search(words, message)


def first_hits(rank, num_workers, group, name, other_gallery):
    whole = hard_samples()
    queries = share(whole, rank, num_workers)
    gallery = None
    if other_gallery:
        half = whole.rows(np.arange(0, 400, 2))
        gallery = half.rows(np.arange(len(half)) % num_workers == (rank + 1) % num_workers)
    scores = score_sharded(queries, gallery, DISTANCES[name], (1, 3), group, SETTINGS)
    return complete_sharded_hits(scores, queries, gallery, DISTANCES[name], group)


def hard_samples() -> Embeddings:
    """Classes without meaning, of two or three: most first hits stand far behind, some as ties."""
    plain = samples()
    labels = np.random.default_rng(5).permutation(400) // 3
    return Embeddings(plain.vectors, labels, plain.ids)


@pytest.mark.parametrize("other_gallery", [False, True])
@pytest.mark.parametrize("name", ["cosine", "l2"])
def test_first_hits_in_a_divided_gallery_are_those_of_one_process(tmp_path, name, other_gallery):
    whole, distance = hard_samples(), DISTANCES[name]
    gallery = whole.rows(np.arange(0, 400, 2)) if other_gallery else None
    searched = whole if gallery is None else gallery
    expected = score_slice(whole, gallery, slice(0, 400), distance, (1, 3))
    assert (expected.has_match & (expected.first_hit_rank == 0)).mean() > 0.5
    expected = complete_first_hits(expected, whole, searched, distance)
    for num_workers in (1, 2, 3):
        parts = run_workers(first_hits, num_workers, tmp_path, name, other_gallery)
        found = QueryScores.concatenate(parts)
        np.testing.assert_array_equal(found.first_hit_rank, expected.first_hit_rank)


def test_without_a_missed_query_nothing_is_searched_again():
    whole = samples()
    scores = score_sharded(whole, None, DISTANCES["l2"], (400,), None, SETTINGS)
    assert complete_sharded_hits(scores, whole, None, DISTANCES["l2"], None) is scores
