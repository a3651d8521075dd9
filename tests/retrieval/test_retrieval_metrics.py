"""Scores against hand-worked examples, a plain-Python twin and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, normalized_mutual_info_score

from dist_dml.errors import RunError, UsageError
from dist_dml.retrieval.clustering import (
    cluster_nmi,
    kmeans_clusters,
    normalised_mutual_information,
)
from dist_dml.retrieval.distances import DISTANCES, unit_length
from dist_dml.retrieval.metrics import QueryScores, macro_f1, score_queries, summarise


def scores_of(neighbours, labels, counts, recall_at=(1, 2, 4)) -> QueryScores:
    return score_queries(np.array(neighbours), np.array(labels), np.array(counts), recall_at)


def test_one_query_scores_what_the_formulas_give_by_hand():
    # Hits at ranks 1, 3 and 5 of R = 4: precision 1/1 and 2/3 count, rank 5 is behind R.
    scores = scores_of([[7, 1, 7, 2, 7]], [7], [4], recall_at=(1, 2, 4))
    assert scores.recall_hits.tolist() == [[True, True, True]]
    assert scores.precision_at_1.tolist() == [1.0]
    assert scores.r_precision.tolist() == [2 / 4]
    assert scores.map_at_r[0] == pytest.approx((1 + 2 / 3) / 4, rel=1e-15)


def test_a_first_miss_costs_recall_at_1_and_map_but_not_recall_at_2():
    # Hits at ranks 2 and 3 of R = 3: (1/2 + 2/3) / 3.
    scores = scores_of([[1, 7, 7, 2]], [7], [3])
    assert scores.recall_hits.tolist() == [[False, True, True]]
    assert scores.precision_at_1.tolist() == [0.0]
    assert scores.r_precision[0] == pytest.approx(2 / 3)
    assert scores.map_at_r[0] == pytest.approx((1 / 2 + 2 / 3) / 3, rel=1e-15)


def test_each_query_is_judged_by_its_own_r():
    # The same hits (ranks 1 and 2) are perfect for R = 2 and half of R = 4.
    scores = scores_of([[5, 5, 1, 1], [6, 6, 1, 1]], [5, 6], [2, 4])
    assert scores.map_at_r.tolist() == [1.0, 0.5]
    assert scores.r_precision.tolist() == [1.0, 0.5]


def test_lone_queries_are_counted_and_left_out_of_every_mean():
    together = summarise(scores_of([[5, 1, 5, 1], [5, 5, 6, 6]], [5, 9], [2, 0]))
    alone = summarise(scores_of([[5, 1, 5, 1]], [5], [2]))
    assert together.pop("num_queries") == 2
    assert together.pop("num_queries_without_match") == 1
    assert (alone.pop("num_queries"), alone.pop("num_queries_without_match")) == (1, 0)
    assert together == alone
    assert list(alone) == [
        *("recall_at_1", "recall_at_2", "recall_at_4"),
        *("precision_at_1", "r_precision", "map_at_r", "f1_at_1"),
    ]


def test_no_answerable_query_is_an_error_and_not_a_nan():
    with pytest.raises(RunError, match="none of 2 queries"):
        summarise(scores_of([[1, 1, 1, 1], [1, 1, 1, 1]], [5, 6], [0, 0]))


def test_too_few_neighbours_are_refused_since_scores_would_be_too_low():
    with pytest.raises(UsageError, match="search for 8"):
        scores_of([[1, 2, 3, 4]], [1], [3], recall_at=(1, 8))
    with pytest.raises(UsageError, match=r"R=5 .* search for 5"):
        scores_of([[1, 2, 3, 4]], [1], [5])
    with pytest.raises(UsageError, match="at least 1"):
        scores_of([[1, 2, 3, 4]], [1], [2], recall_at=(0, 1))


def test_a_missing_neighbour_is_never_a_hit():
    scores = scores_of([[-1, -1, -1, -1]], [0], [2])
    assert not scores.recall_hits.any()
    assert scores.map_at_r.tolist() == [0.0]


def test_scores_equal_a_plain_python_twin_on_random_lists():
    rng = np.random.default_rng(0)
    neighbours = rng.integers(0, 4, (200, 30))
    labels = rng.integers(0, 5, 200)  # class 4 is never found
    counts = rng.integers(1, 31, 200)
    scores = score_queries(neighbours, labels, counts, (1, 3, 30))
    for i in range(200):
        hits = [int(label == labels[i]) for label in neighbours[i]]
        count = int(counts[i])
        average = sum(hits[j] * sum(hits[: j + 1]) / (j + 1) for j in range(count)) / count
        assert scores.map_at_r[i] == pytest.approx(average, abs=1e-14)
        assert scores.r_precision[i] == pytest.approx(sum(hits[:count]) / count, abs=1e-14)
        assert scores.recall_hits[i].tolist() == [any(hits[:k]) for k in (1, 3, 30)]
        assert scores.precision_at_1[i] == hits[0]


def test_concatenated_parts_equal_the_whole():
    rng = np.random.default_rng(1)
    neighbours, labels = rng.integers(0, 4, (50, 6)), rng.integers(0, 4, 50)
    counts = rng.integers(0, 7, 50)
    whole = score_queries(neighbours, labels, counts, (1, 4))
    cuts = [slice(0, 0), slice(0, 17), slice(17, 18), slice(18, 50)]
    parts = [score_queries(neighbours[s], labels[s], counts[s], (1, 4)) for s in cuts]
    joined = QueryScores.concatenate(parts)
    for name in QueryScores.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    with pytest.raises(UsageError, match="do not join"):
        QueryScores.concatenate([parts[0], score_queries(neighbours, labels, counts, (1,))])


def test_macro_f1_is_right_by_hand():
    # Class 0: 1 of 2 right, nothing else called 0: 2*1/(2+1). Class 1: right, one too many:
    # 2*1/(1+2). Class 2: always called 9: 0. Class 9 is never true and has no F1.
    truth, prediction = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 9])
    assert macro_f1(truth, prediction) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_equals_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, 30, 200) * 7
    prediction = np.where(rng.random(200) < 0.4, truth, rng.integers(0, 40, 200) * 7)
    oracle = f1_score(truth, prediction, labels=np.unique(truth), average="macro")
    assert macro_f1(truth, prediction) == pytest.approx(oracle, abs=1e-12)


@pytest.mark.parametrize("clusters", [1, 2, 17, 300])
def test_nmi_equals_scikit_learn(clusters):
    rng = np.random.default_rng(clusters)
    truth = rng.integers(0, 20, 300) * 1000
    found = np.where(rng.random(300) < 0.5, truth % clusters, rng.integers(0, clusters, 300))
    oracle = normalized_mutual_info_score(truth, found)
    assert normalised_mutual_information(truth, found) == pytest.approx(oracle, abs=1e-12)


def test_nmi_is_1_for_renamed_clusters_and_right_by_hand_otherwise():
    truth = np.array([0, 0, 1, 1])
    assert normalised_mutual_information(truth, np.array([8, 8, 3, 3])) == pytest.approx(1.0)
    assert normalised_mutual_information(truth, np.array([0, 1, 0, 1])) == pytest.approx(0.0)
    # One class split in two: I = ln 2, H = ln 2 and 1.5 ln 2.
    split = normalised_mutual_information(truth, np.array([0, 1, 2, 2]))
    assert split == pytest.approx(2 * 1.0 / 2.5)
    assert normalised_mutual_information(np.zeros(4, np.int64), np.ones(4, np.int64)) == 1.0


@pytest.mark.parametrize("name", ["cosine", "l2"])
def test_separate_clusters_are_found_and_the_seed_decides(name, capfd):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 40)
    centres = np.eye(8)[labels] * 10
    vectors = (centres + 0.01 * rng.standard_normal((200, 8))).astype(np.float32)
    best = max(cluster_nmi(vectors, labels, DISTANCES[name], seed) for seed in range(8))
    assert best == pytest.approx(1.0)
    noise = rng.standard_normal((200, 8)).astype(np.float32)
    first, again, other = (kmeans_clusters(noise, 20, DISTANCES[name], s) for s in (3, 3, 2**62))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert capfd.readouterr() == ("", "")  # FAISS would warn of few points on stderr


def test_cosine_clusters_ignore_the_lengths_of_embeddings():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((300, 6)).astype(np.float32)
    scaled = vectors * 2.0 ** rng.integers(-3, 4, (300, 1)).astype(np.float32)
    ours = kmeans_clusters(vectors, 10, DISTANCES["cosine"], 0)
    np.testing.assert_array_equal(ours, kmeans_clusters(scaled, 10, DISTANCES["cosine"], 0))
    assert (kmeans_clusters(vectors, 10, DISTANCES["l2"], 0) != ours).any()


@pytest.mark.parametrize("name", ["cosine", "l2"])
def test_clusters_converge_to_those_of_the_distance(name):
    """Each point ends nearest to its own cluster's mean: by angle for cosine, by length for l2.

    Not from every seed within the iterations, but never to the other distance's clusters.
    """
    rng = np.random.default_rng(0)
    vectors = unit_length((rng.standard_normal((150, 3)) + 0.7).astype(np.float32))
    converged = {"cosine": 0, "l2": 0}
    for seed in range(20):
        found = kmeans_clusters(vectors, 4, DISTANCES[name], seed)
        means = np.stack([vectors[found == cluster].mean(axis=0) for cluster in range(4)])
        by_angle = (vectors @ unit_length(means).T).argmax(axis=1)
        by_length = ((vectors[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
        if (by_angle != by_length).any():
            converged["cosine"] += bool((found == by_angle).all())
            converged["l2"] += bool((found == by_length).all())
    assert converged.pop(name) >= 5
    assert set(converged.values()) == {0}
