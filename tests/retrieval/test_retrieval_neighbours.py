"""Neighbours against a dense float64 twin, with duplicates, ties and self matches."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import DISTANCES, named_distance, unit_length
from dist_dml.retrieval.gallery_search import SearchSettings
from dist_dml.retrieval.neighbours import block_rows, exact_neighbours

ABSOLUTE = 3e-5  # float32 against float64, for squared distances of a few hundred
COSINE, L2 = DISTANCES["cosine"], DISTANCES["l2"]


def twin(queries, gallery, distance) -> np.ndarray:
    """All values (q, g) in float64, written in another way than FAISS's."""
    queries, gallery = queries.astype(np.float64), gallery.astype(np.float64)
    if distance.name == "l2":
        return ((queries[:, None] - gallery[None]) ** 2).sum(axis=2)
    norms = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(gallery, axis=1)
    return queries @ gallery.T / norms


def assert_equals_twin(queries, gallery, k, distance, query_ids=None, gallery_ids=None):
    indices, distances = exact_neighbours(queries, gallery, k, distance, query_ids, gallery_ids)
    assert indices.shape == distances.shape == (len(queries), k)
    assert (indices.dtype, distances.dtype) == (np.int64, np.float32)
    values = twin(queries, gallery, distance)
    for i, row in enumerate(values):
        allowed = np.ones(len(gallery), dtype=bool)
        if query_ids is not None:
            allowed = gallery_ids != query_ids[i]
        best = np.sort(-row[allowed])[:k] * -1 if distance is COSINE else np.sort(row[allowed])[:k]
        found = indices[i][indices[i] >= 0]
        assert len(found) == len(set(found)) == len(best)
        assert allowed[found].all()
        # At ties any order is right: what counts is how near the found ones are.
        np.testing.assert_allclose(row[found], best, rtol=1e-5, atol=ABSOLUTE)
        np.testing.assert_allclose(distances[i][: len(best)], best, rtol=1e-5, atol=ABSOLUTE)
        assert (indices[i][len(best) :] == -1).all()
        assert (distances[i][len(best) :] == distance.farthest).all()


@pytest.mark.parametrize("distance", [COSINE, L2], ids=["cosine", "l2"])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_neighbours_equal_the_dense_float64_twin(distance, k):
    rng = np.random.default_rng(k)
    queries = rng.standard_normal((70, 16)).astype(np.float32) * 3
    gallery = rng.standard_normal((211, 16)).astype(np.float32)
    assert_equals_twin(queries, gallery, k, distance)


@pytest.mark.parametrize("distance", [COSINE, L2], ids=["cosine", "l2"])
def test_duplicates_do_not_stand_in_for_the_query_itself(distance):
    """30 points, each three times: rank 0 is a duplicate two times out of three."""
    rng = np.random.default_rng(0)
    vectors = np.tile(rng.standard_normal((30, 8)).astype(np.float32), (3, 1))
    ids = rng.permutation(90) + 1000
    assert_equals_twin(vectors, vectors, 7, distance, ids, ids)
    indices, _ = exact_neighbours(vectors, vectors, 2, distance, ids, ids)
    for i in range(90):
        assert set(indices[i]) == {j for j in range(i % 30, 90, 30) if j != i}


def test_a_space_of_one_point_still_excludes_only_the_query():
    vectors, ids = np.ones((150, 4), np.float32), np.arange(150)
    for k in (1, 3, 120, 149, 150):
        assert_equals_twin(vectors, vectors, k, COSINE, ids, ids)


def test_small_galleries_are_padded_with_minus_one():
    rng = np.random.default_rng(0)
    vectors, ids = rng.standard_normal((4, 3)).astype(np.float32), np.array([9, 5, 7, 1])
    for distance in (COSINE, L2):
        assert_equals_twin(vectors, vectors, 6, distance)
        assert_equals_twin(vectors, vectors, 6, distance, ids, ids)
        assert_equals_twin(vectors, vectors, 4, distance, ids, ids)
        assert_equals_twin(vectors[:1], vectors[:1], 2, distance, ids[:1], ids[:1])


def test_ids_exclude_only_where_they_coincide():
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((10, 4)).astype(np.float32)
    gallery = np.concatenate([queries[:5], rng.standard_normal((20, 4)).astype(np.float32)])
    gallery_ids = np.arange(25)
    assert_equals_twin(queries, gallery, 3, L2, np.arange(10), gallery_ids)
    indices, _ = exact_neighbours(queries, gallery, 1, L2, np.arange(10) + 100, gallery_ids)
    assert indices[:5, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("distance", [COSINE, L2], ids=["cosine", "l2"])
@pytest.mark.parametrize("width", [32, 128])
def test_neighbours_are_bitwise_the_same_wherever_a_query_stands(distance, width):
    """Products differ in the last bits between 20 and 5000 queries; exact values do not."""
    rng = np.random.default_rng(width)
    vectors = rng.standard_normal((4301, width)).astype(np.float32)
    ids = np.arange(4301)
    whole = exact_neighbours(vectors, vectors, 12, distance, ids, ids)
    for start, stop in ((0, 1), (1, 20), (1003, 3900), (4300, 4301)):
        part = slice(start, stop)
        indices, distances = exact_neighbours(vectors[part], vectors, 12, distance, ids[part], ids)
        np.testing.assert_array_equal(indices, whole[0][part])
        np.testing.assert_array_equal(distances, whole[1][part])


def test_more_queries_than_a_block_are_all_answered():
    assert [block_rows(k) for k in (1, 100, 10_000, 10**7)] == [8192, 8192, 167, 64]
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((700, 64)).astype(np.float32)
    settings = SearchSettings(memory_bytes=2**15)
    assert block_rows(3, settings.memory_bytes) == 64
    indices, _ = exact_neighbours(vectors, vectors, 3, L2, settings=settings)
    np.testing.assert_array_equal(indices[:, 0], np.arange(700))


def test_cosine_ignores_lengths_and_leaves_zero_rows_zero():
    vectors = np.array([[3, 4], [0, 0], [1e-30, 0], [-2e18, 0]], np.float32)
    expected = np.array([[0.6, 0.8], [0, 0], [1, 0], [-1, 0]], np.float32)
    np.testing.assert_allclose(unit_length(vectors), expected, rtol=1e-7)
    assert vectors[0, 0] == 3  # the argument is untouched


def test_what_cannot_be_searched_is_refused_in_one_line():
    vectors, ids = np.ones((3, 4), np.float32), np.array([1, 2, 2])
    with pytest.raises(UsageError, match="id 2 stands for 2 items"):
        exact_neighbours(vectors, vectors, 1, L2, ids, ids)
    # Where the tests run with checked shapes, those refuse it first.
    with pytest.raises((UsageError, TypeCheckError), match=r"4 wide and the gallery 3|Type-check"):
        exact_neighbours(vectors, vectors[:, :3], 1, L2)
    with pytest.raises(UsageError, match="or neither"):
        exact_neighbours(vectors, vectors, 1, L2, query_ids=ids)
    with pytest.raises(UsageError, match="among 0 items"):
        exact_neighbours(vectors, vectors[:0], 1, L2)
    with pytest.raises(UsageError, match="'manhattan', which is unknown; use cosine, l2"):
        named_distance("manhattan")
