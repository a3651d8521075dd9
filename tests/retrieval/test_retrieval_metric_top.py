"""The top-k variant against the dense distance of truncated vectors; agreement of rankings."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError
from test_retrieval_metric_distances import distances
from test_retrieval_metric_neighbours import classified

from dist_dml.errors import UsageError
from dist_dml.retrieval import sparse_neighbours
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.ranking import nearest, rank_agreement, top_agreement
from dist_dml.retrieval.sparse_neighbours import truncate

FORMS = ["k=1,p=1", "k=0.5,p=1", "p=0.5", "p=0.1", "p=0.01"]


def dense_of_truncated(form: str, queries: Embeddings, gallery: Embeddings, num_classes: int):
    """Values (q, g) from vectors in which dropped classes have probability 0."""
    x, y = (np.full((len(one), num_classes), -np.inf, np.float32) for one in (queries, gallery))
    for rows, samples in ((x, queries), (y, gallery)):
        assert samples.support is not None
        np.put_along_axis(rows, samples.support, samples.vectors, axis=1)
    parameters = named_distance(f"metric({form})").parameters
    assert parameters is not None
    values = distances(x, y, parameters.k, parameters.p)
    values[queries.ids[:, None] == gallery.ids] = np.inf
    return values


def assert_equals_dense(form: str, queries: Embeddings, gallery: Embeddings, num_classes: int):
    distance = named_distance(f"metric({form},top={gallery.vectors.shape[1]})")
    expected = dense_of_truncated(form, queries, gallery, num_classes)
    indices, values = nearest(queries, gallery, len(gallery) - 1, distance)
    np.testing.assert_allclose(
        values, np.sort(expected, axis=1)[:, : values.shape[1]], rtol=1e-11, atol=1e-13
    )
    np.testing.assert_allclose(
        np.take_along_axis(expected, indices, axis=1), values, rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("top", [1, 4, 12])
def test_the_inverted_index_equals_the_dense_distance_of_truncated_vectors(form, top):
    distance = named_distance(f"metric({form},top={top})")
    gallery = truncate(classified(0, 130, 12), distance)
    queries = truncate(classified(1, 40, 12, first_id=100), distance)
    assert_equals_dense(form, queries, gallery, 12)


def test_with_all_classes_kept_it_is_the_full_distance():
    samples = classified(2, 100, 9)
    distance = named_distance("metric(p=0.1,top=9)")
    kept = truncate(samples, distance)
    full = nearest(samples, samples, 99, named_distance("metric(p=0.1)"))
    np.testing.assert_allclose(nearest(kept, kept, 99, distance)[1], full[1], rtol=1e-12)
    agreement = top_agreement(samples, None, named_distance("metric(p=0.1,top=50)"))
    assert agreement == pytest.approx({"rank_overlap_at_10": 1, "rank_spearman_at_100": 1})


@pytest.mark.parametrize("form", FORMS)
def test_equal_vectors_are_at_distance_zero_and_certain_ones_are_no_nan(form):
    # 20 classes: their sum and the differences from it round differently.
    kept = truncate(classified(3, 40, 60), named_distance("metric(p=0.1,top=20)"))
    vectors = np.concatenate([kept.vectors, kept.vectors, np.full((6, 20), -40, np.float32)])
    vectors[80:, 1] = 0  # Probability 1 of the second class kept.
    assert kept.support is not None
    certain = np.arange(60).reshape(3, 20)
    support = np.concatenate([kept.support, kept.support, certain, certain[:, ::-1]])
    samples = Embeddings(vectors, np.zeros(86, np.int64), np.arange(86), support)
    indices, values = nearest(samples, samples, 85, named_distance(f"metric({form},top=20)"))
    np.testing.assert_array_equal(values[:40, 0], 0)
    np.testing.assert_array_equal(indices[:40, 0], np.arange(40, 80))
    assert not np.isnan(values).any()
    assert (values >= 0).all()
    assert np.isinf(values[80:]).any() == (form == "k=1,p=1")
    assert_equals_dense(form, samples.rows(slice(80)), samples.rows(slice(80)), 60)


def test_class_ids_beyond_float32_and_many_classes_cost_nothing(monkeypatch):
    """C = 10^9 with ids that float32 would merge; matches are cut into parts of a small budget."""
    monkeypatch.setattr(sparse_neighbours, "BUDGET_BYTES", 200_000)
    kept = truncate(classified(4, 80, 12), named_distance("metric(p=0.1,top=6)"))
    assert kept.support is not None
    far = Embeddings(kept.vectors, kept.labels, kept.ids, kept.support + 10**9)
    distance = named_distance("metric(p=0.1,top=6)")
    for found, expected in zip(
        nearest(far, far, 79, distance), nearest(kept, kept, 79, distance), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert_equals_dense("p=0.1", kept, kept, 12)


def test_truncation_keeps_the_largest_and_their_classes():
    vectors = np.array([[-3, -1, -2, -1]], np.float32)
    samples = Embeddings(vectors, np.array([0]), np.array([0]))
    kept = truncate(samples, named_distance("metric(p=0.1,top=3)"))
    assert kept.support is not None
    assert (kept.vectors.tolist(), kept.support.tolist()) == ([[-1, -1, -2]], [[1, 3, 2]])
    with pytest.raises(UsageError, match="truncated already"):
        truncate(kept, named_distance("metric(p=0.1,top=2)"))


def test_agreement_is_what_the_definitions_give_by_hand():
    full = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    sparse = np.array([[1, 2, 3, 4], [2, 1, 4, 3], [5, 6, 7, 8]])
    found = rank_agreement(full, sparse, overlap_at=3, spearman_at=4)
    # Row 1: {1, 2} of three; ranks 1 2 3 4 against 2 1 4 3 correlate by 0.6. Row 2: ranks 1 2 3 4
    # 6.5 6.5 6.5 6.5 against the reverse.
    ranks = np.array([1, 2, 3, 4, 6.5, 6.5, 6.5, 6.5])
    disjoint = np.corrcoef(ranks, np.roll(ranks, 4))[0, 1]
    assert disjoint < -0.85
    expected = {"rank_overlap_at_3": (1 + 2 / 3 + 0) / 3, "rank_spearman_at_4": 1.6 + disjoint}
    expected["rank_spearman_at_4"] /= 3
    assert found == pytest.approx(expected)
    short = rank_agreement(np.array([[4, -1]]), np.array([[4, -1]]), 10, 10)
    assert short == {"rank_overlap_at_10": 1.0, "rank_spearman_at_10": 1.0}
    # Where the tests run with checked shapes, those refuse it first.
    with pytest.raises((UsageError, TypeCheckError), match=r"cannot be compared|Type-check"):
        rank_agreement(full, sparse[:2])


def test_more_kept_classes_agree_more_with_the_full_distance():
    samples = classified(5, 200, 40)
    overlaps = [
        top_agreement(samples, None, named_distance(f"metric(p=0.5,top={top})"))
        for top in (1, 8, 32)
    ]
    values = [found["rank_overlap_at_10"] for found in overlaps]
    assert values == sorted(values)
    assert values[0] < 0.5 < values[2]
    with pytest.raises(UsageError, match="no top-k variant"):
        top_agreement(samples, None, named_distance("metric(p=0.5)"))
