"""Pruning by the triangle inequality finds the identical neighbours, and prunes where it can."""

import numpy as np
import pytest
import torch

from dist_dml.errors import UsageError
from dist_dml.metric_parameters import MetricParameters, largest_metric_k
from dist_dml.retrieval import pivots
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.pivots import pruned_neighbours
from dist_dml.retrieval.probability_distances import metric_sums, pairwise_sums
from dist_dml.retrieval.probability_neighbours import probability_blocks


def confident(seed: int, n: int, num_classes: int, gap: float) -> np.ndarray:
    """Log-probabilities of a classifier whose label's logit leads by `gap` on average."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((n, num_classes)) * 1.5
    logits[np.arange(n), rng.integers(0, num_classes, n)] += gap
    logits -= logits.max(axis=1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def assert_identical(queries, gallery, k, p, query_ids=None, gallery_ids=None) -> float:
    distance = named_distance(f"metric(p={p})")
    blocks = list(probability_blocks(queries, gallery, k, distance, query_ids, gallery_ids))
    assert distance.parameters is not None
    found = pruned_neighbours(queries, gallery, k, distance.parameters, query_ids, gallery_ids)
    np.testing.assert_array_equal(found.indices, np.concatenate([block[1] for block in blocks]))
    np.testing.assert_array_equal(found.distances, np.concatenate([block[2] for block in blocks]))
    return found.share_computed


@pytest.mark.parametrize("p", [0.9, 0.5, 0.1, 0.01, 1e-5])
@pytest.mark.parametrize("gap", [0, 4, 10, 25])
def test_pruned_neighbours_are_bitwise_those_of_the_full_search(p, gap):
    gallery = confident(0, 900, 20, gap)
    queries = np.concatenate([confident(1, 30, 20, gap), confident(2, 10, 20, 0)])
    for k in (1, 7, 60):
        assert_identical(queries, gallery, k, p)


@pytest.mark.parametrize("gap", [3, 30])
def test_duplicates_ties_and_the_query_itself_are_as_in_the_full_search(gap):
    rows = confident(0, 300, 6, gap)
    rows = np.concatenate([rows, rows, rows[:150]])
    # Permuted classes give the same distances from the uniform vector: ties among other vectors.
    rows = np.concatenate([rows, rows[:50, ::-1], np.full((1, 6), -np.log(6), np.float32)])
    ids = np.random.default_rng(0).permutation(len(rows))
    queries = np.r_[0:25, 600:620, len(rows) - 1]
    for k in (1, 3, 40):
        assert_identical(rows[queries], rows, k, 0.5, ids[queries], ids)


def test_small_galleries_are_searched_whole_and_padded():
    rows, ids = confident(0, 9, 4, 5), np.arange(9)
    assert assert_identical(rows, rows, 12, 0.5, ids, ids) == 1


def test_a_confident_classifier_needs_few_distances_and_a_poor_one_all():
    gallery, queries = confident(0, 3000, 100, 20), confident(1, 40, 100, 20)
    assert assert_identical(queries, gallery, 5, 0.5) < 0.1
    poor, queries = confident(0, 1000, 100, 0), confident(1, 40, 100, 0)
    assert 0.9 < assert_identical(queries, poor, 5, 0.5) < 1.1


@pytest.mark.parametrize("p", [0.9, 0.5, 0.1, 0.01, 1e-5])
def test_no_bound_exceeds_the_distance_it_bounds(p):
    parameters = MetricParameters(largest_metric_k(p), p)
    # From a vertex the bound is the distance itself: only the slack for rounding parts them.
    vertices = np.full((12, 12), -800, np.float32)
    np.fill_diagonal(vertices, 0)
    others = [confident(0, 60, 12, gap) for gap in (0, 5, 15)]
    rows = torch.tensor(np.concatenate([vertices, *others]))
    exact = pairwise_sums(rows, rows, metric_sums(parameters))
    bounds = pivots._Bounds.of(rows, parameters)
    sums = pivots._class_sums(rows, parameters)
    tight = 0.0
    for i, row in enumerate(rows):
        pivot = int(row.argmax())
        to_pivot = pivots._to_vertices(bounds.sums, rows[:, pivot], parameters)
        lower = bounds.below(row, sums[i], pivot, to_pivot)
        assert (lower <= exact[i].numpy()).all()
        tight = max(tight, float((lower / (exact[i].numpy() + 1e-9)).max()))
    assert tight > 0.9


def test_distances_to_vertices_are_those_to_one_hot_vectors():
    parameters = MetricParameters(0.8, 0.5)
    rows = torch.tensor(confident(0, 20, 7, 8))
    vertices = torch.full((7, 7), -torch.inf)
    vertices.fill_diagonal_(0)
    expected = pairwise_sums(rows, vertices, metric_sums(parameters))
    sums = pivots._class_sums(rows, parameters)
    found = pivots._to_vertices(sums[:, None], rows, parameters)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_pruning_without_the_triangle_inequality_is_refused():
    rows = confident(0, 5, 4, 3)
    for parameters in (MetricParameters(1.0, 1.0), MetricParameters(0.9, 0.5)):
        with pytest.raises(UsageError, match=r"it holds for k <= K\(p\) = 0"):
            pruned_neighbours(rows, rows, 1, parameters)
