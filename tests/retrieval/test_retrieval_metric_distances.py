"""Distances between probability vectors against the written-out formula and hand-worked values."""

import math

import numpy as np
import pytest
import torch

from dist_dml.errors import UsageError
from dist_dml.metric_parameters import MetricParameters, largest_metric_k
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.probability_distances import (
    coordinate_distances,
    log_differences,
    metric_sums,
    pairwise_sums,
    squared_sums,
)

PARAMETERS = [(1.0, 1.0), (1 / (1 + 1e-6), 1.0), (0.5, 1.0), (0.9, 0.99), (0.8284, 0.5)]
PARAMETERS += [(largest_metric_k(p), p) for p in (0.3, 0.1, 0.01, 1e-3, 1e-5)]


def log_probabilities(seed: int, n: int, num_classes: int, spread: float = 3.0) -> np.ndarray:
    logits = np.random.default_rng(seed).standard_normal((n, num_classes)) * spread
    logits -= logits.max(axis=1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def twin(queries: np.ndarray, gallery: np.ndarray, k: float, p: float) -> np.ndarray:
    """The formula (16), from probabilities."""
    x, y = np.exp(queries.astype(np.float64)), np.exp(gallery.astype(np.float64))
    powers = np.abs(x[:, None] - y[None]) ** p
    return -(1 / p) * np.log1p(-k * powers).sum(axis=2)


def distances(queries, gallery, k: float, p: float) -> np.ndarray:
    a, b = (torch.tensor(np.asarray(rows), dtype=torch.float32) for rows in (queries, gallery))
    return pairwise_sums(a, b, metric_sums(MetricParameters(k, p))).numpy()


@pytest.mark.parametrize(("k", "p"), PARAMETERS)
@pytest.mark.parametrize("num_classes", [1, 2, 10, 300])
def test_distances_equal_the_formula_in_float64(k, p, num_classes):
    queries, gallery = log_probabilities(0, 7, num_classes), log_probabilities(1, 9, num_classes)
    expected = twin(queries, gallery, k, p)
    # 1 - k d^p is known to 1e-16, its logarithm to that over 1 - k.
    rounding = num_classes * 1e-15 / max(1 - k, 1e-9) / p
    np.testing.assert_allclose(
        distances(queries, gallery, k, p), expected, rtol=1e-12, atol=rounding
    )


def test_the_euclidean_distance_is_that_of_the_probabilities():
    queries, gallery = log_probabilities(0, 5, 40), log_probabilities(1, 6, 40)
    found = pairwise_sums(torch.tensor(queries), torch.tensor(gallery), squared_sums)
    x, y = np.exp(queries.astype(np.float64)), np.exp(gallery.astype(np.float64))
    expected = ((x[:, None] - y[None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_probabilities_that_float32_cannot_hold_decide_at_a_small_p():
    """e^-200 and e^-150 are 0 in float32: all three vectors would be equal."""
    k, p = largest_metric_k(0.01), 0.01
    vectors = np.array([[0, -200, -500], [0, -150, -500], [0, -150, -400]], np.float32)
    found = distances(vectors, vectors, k, p)

    def h(log_difference: float) -> float:
        return -math.log1p(-k * math.exp(p * log_difference)) / p

    # The smaller one of each pair is e^-50 or less of the larger one.
    expected = np.array([[0, h(-150), h(-150) + h(-400)], [0, 0, h(-400)], [0, 0, 0]])
    np.testing.assert_allclose(found, expected + expected.T, rtol=1e-12)
    assert found[0, 1] > 10


def test_what_is_left_to_one_decides_among_confident_samples():
    """1 - 1e-12 and 1 - 3e-12 differ by 2e-12 in both classes, which float32 and a rounding of 1
    minus that lose."""
    rests = np.array([1e-12, 3e-12])
    vectors = np.stack([np.log1p(-rests), np.log(rests)], axis=1).astype(np.float32)
    rests = np.exp(vectors[:, 1].astype(np.float64))
    for k, p in PARAMETERS:
        expected = -2 / p * math.log1p(-k * abs(rests[0] - rests[1]) ** p)
        found = distances(vectors, vectors, k, p)
        # At p = 1 the absolute rounding of 1e-16 a class remains.
        assert found[0, 1] == pytest.approx(expected, rel=1e-6, abs=5e-16)
        assert (np.diag(found) == 0).all()


def test_confident_samples_of_two_classes_are_not_infinitely_far():
    rest = 1e-9
    vectors = np.log(np.array([[1, rest], [rest, 1]]), dtype=np.float32)
    vectors[[0, 1], [0, 1]] = -rest  # log(1 - rest)
    found = distances(vectors, vectors, 1.0, 1.0)
    assert found[0, 1] == pytest.approx(-2 * math.log(2 * rest), rel=1e-6)


def test_vertices_are_infinitely_far_by_l1_and_at_f_of_2m_by_a_metric():
    vertices = np.array([[0, -np.inf, -np.inf], [-np.inf, 0, -np.inf]], np.float32)
    np.testing.assert_array_equal(
        distances(vertices, vertices, 1, 1), [[0, math.inf], [math.inf, 0]]
    )
    k, p = largest_metric_k(0.1), 0.1
    m = -math.log(1 - k) / p
    np.testing.assert_allclose(distances(vertices, vertices, k, p)[0], [0, 2 * m], rtol=1e-12)


@pytest.mark.parametrize("p", [1.0, 0.5, 1e-5])
def test_equal_vectors_are_at_distance_zero_and_nothing_is_nan(p):
    rows = log_probabilities(0, 20, 50, spread=100)
    rows = np.concatenate([rows, rows[:5], np.full((1, 50), -np.log(50), np.float32)])
    found = distances(rows, rows, largest_metric_k(p) or 1.0, p)
    assert not np.isnan(found).any()
    assert (np.diag(found) == 0).all()
    assert (np.diag(found[20:25, :5]) == 0).all()
    np.testing.assert_array_equal(found, found.T)
    assert not np.signbit(found).any()


@pytest.mark.parametrize("num_classes", [3, 10, 129, 700])
def test_a_pair_has_the_same_bits_wherever_it_stands_and_for_any_threads(num_classes):
    rows = torch.tensor(log_probabilities(0, 600, num_classes, spread=6))
    reduce_ = metric_sums(MetricParameters(0.9, 0.2))
    whole = pairwise_sums(rows[:23], rows, reduce_)
    for a, b in ((0, 1), (5, 23), (22, 23)):
        for some in (torch.arange(600)[77:], torch.tensor([599, 3, 3]), torch.arange(100, 165)):
            part = pairwise_sums(rows[a:b], rows[some], reduce_)
            assert torch.equal(part, whole[a:b, some])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(pairwise_sums(rows[:23], rows, reduce_), whole)
    finally:
        torch.set_num_threads(threads)


def test_single_coordinates_are_exact_from_logarithms():
    a = torch.tensor([0.0, -1e-12, -30.0, -700.0, -2.0], dtype=torch.float64)
    b = torch.tensor([-math.inf, -3e-12, -31.0, -690.0, -2.0], dtype=torch.float64)
    expected = [1, 2e-12, math.exp(-30) - math.exp(-31), math.exp(-690) - math.exp(-700), 0]
    difference = log_differences(a, b)
    np.testing.assert_allclose(difference, expected, rtol=1e-11)
    found = coordinate_distances(difference, MetricParameters(0.5, 1.0))
    np.testing.assert_allclose(found, -np.log1p(-0.5 * np.array(expected)), rtol=1e-11)


def test_distances_are_named_and_say_what_they_are_computed_from():
    spaces = {name: named_distance(name).space for name in ("cosine", "l2", "probability_l2")}
    assert list(spaces.values()) == ["embedding", "embedding", "log_probability"]
    full, top = named_distance("metric(k=0.8,p=0.5)"), named_distance("metric(p=0.1, top=64)")
    assert (full.name, full.space, full.top) == ("metric_k0.8_p0.5", "log_probability", 0)
    assert (top.name, top.space, top.top) == ("metric_p0.1_top64", "top_log_probability", 64)
    assert full.parameters == MetricParameters(0.8, 0.5)
    assert (full.has_nmi, top.has_nmi) == (True, False)
    assert full.farthest == math.inf
    with pytest.raises(UsageError, match=r"unknown; use cosine, l2, probability_l2 or metric"):
        named_distance("manhattan")
    with pytest.raises(UsageError, match="breaks 0 < p <= 1"):
        named_distance("metric(p=1.5)")
