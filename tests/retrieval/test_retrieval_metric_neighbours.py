"""Searches and whole measurements by distances of probabilities, in slices and with ties."""

import io
import itertools

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from test_retrieval_metric_distances import log_probabilities, twin

from dist_dml.errors import UsageError
from dist_dml.metric_parameters import MetricParameters
from dist_dml.retrieval import probability_neighbours
from dist_dml.retrieval.clustering import cluster_nmi, kmeans_clusters
from dist_dml.retrieval.distances import DISTANCES, Distance, named_distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.metrics import QueryScores
from dist_dml.retrieval.neighbours import exact_neighbours
from dist_dml.retrieval.protocol import measure, score_slice
from dist_dml.retrieval.ranking import nearest, nearest_blocks
from dist_dml.retrieval.report import choose_rows, retrieval_gallery

METRIC = named_distance("metric(p=0.1)")
NAMES = ["probability_l2", "metric(k=1,p=1)", "metric(p=0.5)", "metric(p=0.1)", "metric(p=0.01)"]


def classified(seed: int, n: int, num_classes: int = 10, first_id: int = 0) -> Embeddings:
    """What a mediocre classifier says of `n` samples."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    logits = rng.standard_normal((n, num_classes)) * 2
    logits[np.arange(n), labels] += 3
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return Embeddings(logits.astype(np.float32), labels, first_id + rng.permutation(n))


def dense(distance: Distance, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    if isinstance(distance.parameters, MetricParameters):
        return twin(queries, gallery, distance.parameters.k, distance.parameters.p)
    x, y = np.exp(queries.astype(np.float64)), np.exp(gallery.astype(np.float64))
    return ((x[:, None] - y[None]) ** 2).sum(axis=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 5, 119, 130])
def test_neighbours_equal_the_sorted_dense_twin_without_the_query_itself(name, k):
    distance, samples = named_distance(name), classified(0, 120)
    indices, values = nearest(samples.rows(slice(30, 60)), samples, k, distance)
    expected = dense(distance, samples.vectors[30:60], samples.vectors)
    expected[np.arange(30), np.arange(30, 60)] = np.inf
    order = np.argsort(expected, axis=1, kind="stable")[:, : min(k, 119)]
    np.testing.assert_array_equal(indices[:, : order.shape[1]], order)
    sorted_ = np.take_along_axis(expected, order, axis=1)
    np.testing.assert_allclose(values[:, : order.shape[1]], sorted_, rtol=1e-9)
    assert (indices[:, order.shape[1] :] == -1).all()
    assert (values[:, order.shape[1] :] == np.inf).all()


def test_ties_are_in_the_order_of_the_gallery_infinite_ones_too():
    """Vertices: 0 from their own kind, infinitely far from all others by L1."""
    vectors = np.full((12, 3), -800, np.float32)
    vectors[np.arange(12), np.arange(12) % 3] = 0
    samples = Embeddings(vectors, np.arange(12) % 3, np.arange(12))
    indices, values = nearest(samples, samples, 11, named_distance("metric(k=1,p=1)"))
    for i in range(12):
        same = [j for j in range(12) if j % 3 == i % 3 and j != i]
        others = [j for j in range(12) if j % 3 != i % 3]
        assert indices[i].tolist() == same + others
        assert values[i].tolist() == [0.0] * 3 + [np.inf] * 8


@pytest.mark.parametrize("name", ["probability_l2", "metric(p=0.1)", "metric(p=0.1,top=4)"])
def test_neighbours_are_bitwise_the_same_for_any_slices_and_blocks(name, monkeypatch):
    distance, samples = named_distance(name), classified(1, 700, 30)
    vectors = np.concatenate([samples.vectors, samples.vectors[:200]])  # duplicates tie
    labels, ids = np.concatenate([samples.labels, samples.labels[:200]]), np.arange(900)
    samples = Embeddings(vectors, labels, ids)
    if distance.top:
        support = np.argsort(-vectors, axis=1, kind="stable")[:, :4]
        vectors = np.take_along_axis(vectors, support, axis=1)
        samples = Embeddings(vectors, labels, ids, support)
    whole = nearest(samples, samples, 20, distance)
    for start, stop in ((0, 1), (1, 40), (333, 900)):
        part = nearest(samples.rows(slice(start, stop)), samples, 20, distance)
        for found, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(found, expected[start:stop])
    for budget in (1, 100_000):
        monkeypatch.setattr(probability_neighbours, "BUDGET_BYTES", budget)
        monkeypatch.setattr("dist_dml.retrieval.sparse_neighbours.BUDGET_BYTES", budget)
        some = samples.rows(slice(100, 140))
        blocks = list(nearest_blocks(some, samples, 20, distance))
        assert len(blocks) > 1
        for rows, *found in blocks:
            for one, expected in zip(found, whole, strict=True):
                np.testing.assert_array_equal(one, expected[100:140][rows])


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_bitwise_the_same_for_any_slices(name):
    distance, queries = named_distance(name), classified(2, 90)
    whole = score_slice(queries, None, slice(0, 90), distance, (1, 4))
    cuts = [0, 1, 30, 30, 90]
    slices = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    joined = QueryScores.concatenate(
        [score_slice(queries, None, one, distance, (1, 4)) for one in slices]
    )
    for field in QueryScores.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(joined, field), getattr(whole, field))


def test_a_whole_measurement_by_the_metric_has_the_scores_of_the_ranking():
    queries, gallery = classified(3, 80), classified(4, 200, first_id=80)
    found = measure(queries, gallery, [named_distance(name) for name in NAMES], (1, 3), True, 0)
    for name in NAMES:
        distance = named_distance(name)
        order = np.argsort(dense(distance, queries.vectors, gallery.vectors), axis=1)
        hits = gallery.labels[order] == queries.labels[:, None]
        assert found[f"{distance.name}/recall_at_3"] == hits[:, :3].any(axis=1).mean()
        precision = [row[: row.sum()].mean() for row in hits]
        assert found[f"{distance.name}/r_precision"] == pytest.approx(np.mean(precision))
        nmi = cluster_nmi(queries.vectors, queries.labels, distance, 0)
        assert 0.2 < found[f"{distance.name}/nmi"] == nmi


def test_clusters_are_those_of_the_probability_vectors():
    samples = classified(5, 150)
    shares = np.exp(samples.vectors)
    expected = kmeans_clusters(shares, 10, DISTANCES["l2"], 3)
    np.testing.assert_array_equal(kmeans_clusters(samples.vectors, 10, METRIC, 3), expected)


def test_the_top_variant_is_measured_without_nmi_and_drawn():
    samples = classified(6, 60)
    support = np.argsort(-samples.vectors, axis=1)[:, :3]
    vectors = np.take_along_axis(samples.vectors, support, axis=1)
    top = Embeddings(vectors, samples.labels, samples.ids, support)
    distance = named_distance("metric(p=0.1,top=3)")
    found = measure(top, None, [distance], (1,), nmi=True, seed=0)
    assert "metric_p0.1_top3/map_at_r" in found
    assert "metric_p0.1_top3/nmi" not in found
    with pytest.raises(UsageError, match=r"metric_p0.1_top3 has no NMI"):
        cluster_nmi(top.vectors, top.labels, distance, 0)
    image = np.zeros((4, 4), np.uint8)
    for embeddings, one in ((top, distance), (samples, METRIC)):
        figure = retrieval_gallery(embeddings, None, one, lambda _: image, num_rows=4)
        figure.savefig(io.BytesIO(), format="png", dpi=20)
        rows = choose_rows(embeddings, None, one, 4, 5, seed=0)
        nearest_ones, _ = nearest(embeddings, embeddings, 5, one)
        np.testing.assert_array_equal(rows.neighbours, nearest_ones[rows.queries])


def test_what_a_distance_is_not_computed_from_is_refused():
    samples = classified(7, 6, 5)
    embeddings = Embeddings(np.ones((6, 5), np.float32), samples.labels, samples.ids)
    support = np.tile(np.arange(5), (6, 1))
    top = Embeddings(samples.vectors, samples.labels, samples.ids, support)
    refused = [
        (embeddings, "metric(p=0.1)", r"at most 0, and got 1; give log_softmax"),
        (embeddings, "probability_l2", r"at most 0, and got 1"),
        (samples, "metric(p=0.1,top=5)", r"without support; it is computed from top log-prob"),
        (top, "metric(p=0.1)", r"with support; it is computed from log_probability vectors"),
        (top, "cosine", r"with support; it is computed from embedding vectors"),
        (top, "metric(p=0.1,top=4)", r"compares 4 classes and got 5 a sample"),
    ]
    for given, name, message in refused:
        with pytest.raises(UsageError, match=message):
            nearest(given, given, 1, named_distance(name))
    with pytest.raises(UsageError, match="is not one of embeddings"):
        exact_neighbours(samples.vectors, samples.vectors, 1, METRIC)
    twice = support.copy()
    twice[2, 1] = 0
    with pytest.raises(UsageError, match="a class twice in row 2"):
        Embeddings(samples.vectors, samples.labels, samples.ids, twice)
    with pytest.raises(UsageError, match="support holds class -1"):
        Embeddings(samples.vectors, samples.labels, samples.ids, support - 1)
    other = Embeddings(log_probabilities(0, 6, 4), samples.labels, samples.ids + 10)
    # Where the tests run with checked shapes, those refuse it first.
    with pytest.raises((UsageError, TypeCheckError), match=r"5 wide and the gallery 4|Type-check"):
        measure(samples, other, [METRIC], (1,), nmi=False, seed=0)
