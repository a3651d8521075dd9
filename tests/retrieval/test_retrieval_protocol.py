"""Whole measurements: a dense twin, separate galleries, slices of several workers."""

import itertools

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from dist_dml.errors import RunError, UsageError
from dist_dml.retrieval.clustering import cluster_nmi
from dist_dml.retrieval.distances import DISTANCES
from dist_dml.retrieval.metrics import QueryScores, summarise
from dist_dml.retrieval.protocol import Embeddings, measure, relevant_counts, score_slice

COSINE, L2 = DISTANCES["cosine"], DISTANCES["l2"]


def clustered(seed: int, count: int, classes: int, width: int = 8, first_id: int = 0) -> Embeddings:
    """Noisy points about one centre a class; the classes' centres are the same for every seed."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count) * 3
    centres = np.random.default_rng(99).standard_normal((3 * classes, width))
    vectors = centres[labels] + 0.8 * rng.standard_normal((count, width))
    ids = first_id + rng.permutation(count)
    return Embeddings(vectors.astype(np.float32), labels, ids)


def twin(queries: Embeddings, gallery: Embeddings, name: str, recall_at) -> dict[str, float]:
    """The definitions, query by query, over the full float64 ranking."""
    truth, nearest, rows, lone = [], [], [], 0
    for vector, label, own in zip(queries.vectors, queries.labels, queries.ids, strict=True):
        a, b = vector.astype(np.float64), gallery.vectors.astype(np.float64)
        far = ((a - b) ** 2).sum(axis=1)
        if name == "cosine":
            far = -(b @ a) / np.linalg.norm(b, axis=1)
        ranking = [int(gallery.labels[j]) for j in np.argsort(far) if gallery.ids[j] != own]
        hits = [other == label for other in ranking]
        count = sum(hits)
        if count == 0:
            lone += 1
            continue
        truth.append(int(label))
        nearest.append(ranking[0])
        precisions = [sum(hits[: j + 1]) / (j + 1) for j in range(count)]
        average = sum(p for p, hit in zip(precisions, hits, strict=False) if hit) / count
        rows.append([*[any(hits[:k]) for k in recall_at], hits[0], precisions[-1], average])
    f1 = []
    for one in sorted(set(truth)):
        both = sum(t == p == one for t, p in zip(truth, nearest, strict=True))
        f1.append(2 * both / (truth.count(one) + nearest.count(one)))
    names = [*[f"recall_at_{k}" for k in recall_at], "precision_at_1", "r_precision", "map_at_r"]
    scores = dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))
    counts = {"num_queries": len(queries), "num_queries_without_match": lone}
    return {**scores, "f1_at_1": float(np.mean(f1)), **counts}


@pytest.mark.parametrize("seed", range(3))
def test_queries_among_themselves_score_what_the_dense_twin_scores(seed):
    queries = clustered(seed, 90, 40)  # two queries a class: some are lone
    found = measure(queries, None, [COSINE, L2], (1, 2, 4, 8), nmi=True, seed=5)
    for distance in (COSINE, L2):
        expected = twin(queries, queries, distance.name, (1, 2, 4, 8))
        assert expected["num_queries_without_match"] > 0
        expected["nmi"] = cluster_nmi(queries.vectors, queries.labels, distance, 5)
        for name, value in expected.items():
            assert found.pop(f"{distance.name}/{name}") == pytest.approx(value, abs=1e-12)
    assert found == {}


def test_a_separate_gallery_scores_what_the_dense_twin_scores():
    queries, gallery = clustered(0, 60, 30), clustered(1, 200, 25, first_id=60)
    found = measure(queries, gallery, [COSINE, L2], (1, 10), nmi=False, seed=0)
    for name in ("cosine", "l2"):
        for key, value in twin(queries, gallery, name, (1, 10)).items():
            assert found[f"{name}/{key}"] == pytest.approx(value, abs=1e-12)
    assert found["l2/num_queries_without_match"] > 0  # classes 25..29 have no gallery
    assert not any(name.endswith("nmi") for name in found)


def test_a_gallery_that_contains_the_queries_leaves_out_each_query_itself():
    everything = clustered(2, 120, 20)
    queries = everything.rows(np.arange(30, 70))
    found = measure(queries, everything, [L2], (1, 5), nmi=False, seed=0)
    for key, value in twin(queries, everything, "l2", (1, 5)).items():
        assert found[f"l2/{key}"] == pytest.approx(value, abs=1e-12)
    own = measure(everything, everything, [L2], (1, 5), nmi=False, seed=0)
    assert own == measure(everything, None, [L2], (1, 5), nmi=False, seed=0)


def test_a_small_gallery_still_answers_a_large_k():
    queries, gallery = clustered(0, 10, 3), clustered(1, 6, 3, first_id=10)
    found = measure(queries, gallery, [COSINE], (1, 50), nmi=False, seed=0)
    assert found["cosine/recall_at_50"] == 1.0


@pytest.mark.parametrize("distance", [COSINE, L2], ids=["cosine", "l2"])
def test_scores_are_bitwise_the_same_for_any_slices(distance):
    """More workers than queries leave some with an empty slice; duplicates make ties."""
    base = clustered(3, 400, 60, width=64)
    doubled = np.concatenate([base.vectors, base.vectors[:150], np.ones((60, 64), np.float32)])
    labels = np.concatenate([base.labels, base.labels[75:225], np.arange(60)])
    queries = Embeddings(doubled, labels, np.random.default_rng(0).permutation(610))
    whole = score_slice(queries, None, slice(0, 610), distance, (1, 2, 4))
    for cuts in ([0, 305, 610], [0, 1, 2, 300, 300, 609, 610], [*range(0, 610, 61), 610]):
        slices = [slice(a, b) for a, b in itertools.pairwise(cuts)]
        parts = [score_slice(queries, None, s, distance, (1, 2, 4)) for s in slices]
        joined = QueryScores.concatenate(parts)
        for name in QueryScores.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
        assert summarise(joined) == summarise(whole)


def test_relevant_items_do_not_count_the_query_itself():
    vectors = np.ones((5, 2), np.float32)
    queries = Embeddings(vectors, np.array([4, 4, 8, 8, 6]), np.arange(5))
    assert relevant_counts(queries, queries).tolist() == [1, 1, 1, 1, 0]
    gallery = Embeddings(vectors[:4], np.array([8, 4, 4, 4]), np.array([20, 1, 30, 10]))
    assert relevant_counts(queries, gallery).tolist() == [3, 2, 1, 1, 0]


def test_ids_that_were_counted_per_split_are_noticed():
    queries, gallery = clustered(0, 60, 30), clustered(1, 200, 25)
    with pytest.raises(UsageError, match="number the samples of both splits together"):
        measure(queries, gallery, [L2], (1,), nmi=False, seed=0)


def test_a_diverged_model_is_an_error_and_not_a_score():
    vectors = np.ones((4, 2), np.float32)
    vectors[1] = np.inf, -np.inf
    vectors[3, 0] = np.nan
    with pytest.raises(RunError, match=r"2 of 4 embeddings are not finite \(the first has id 11\)"):
        Embeddings(vectors, np.arange(4), np.arange(10, 14))
    large = np.full((2, 2), 3e38, np.float32)  # finite, although its float32 sum is not
    assert len(Embeddings(large, np.arange(2), np.arange(2))) == 2


def test_wrong_shapes_types_and_labels_are_refused():
    good = np.ones((3, 2), np.float32)
    for vectors, labels in ((good, np.arange(2)), (good.astype(np.float64), np.arange(3))):
        # Where the tests run with checked shapes, those refuse it first.
        expected = r"give \(n, D\) float32|Type-check"
        with pytest.raises((UsageError, TypeCheckError), match=expected):
            Embeddings(vectors, labels, np.arange(3))
    with pytest.raises(UsageError, match="a label is -1"):
        Embeddings(good, np.array([0, -1, 2]), np.arange(3))


def test_an_empty_split_is_named_as_such():
    queries = clustered(0, 5, 2)
    with pytest.raises(RunError, match="5 queries and 0 gallery images"):
        score_slice(queries, queries.rows(slice(0, 0)), slice(0, 5), L2, (1,))
