"""All scores of one distance: a brute-force twin and pytorch-metric-learning's calculator."""

import numpy as np
import pytest
import torch
from full_score_cases import TIES, noisy, rankings, samples, twin_scores
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.metrics import adjusted_mutual_info_score

from dist_dml.errors import RunError, UsageError
from dist_dml.protocol_scores import concatenate
from dist_dml.retrieval import first_hits
from dist_dml.retrieval.clustering import (
    adjusted_mutual_information,
    cluster_scores,
    kmeans_clusters,
)
from dist_dml.retrieval.distances import DISTANCES, named_distance, unit_length
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.first_hits import complete_first_hits
from dist_dml.retrieval.full_scores import ScoreOptions, score_everything
from dist_dml.retrieval.metrics import QueryScores, mean_reciprocal_rank
from dist_dml.retrieval.protocol import score_slice

COSINE, L2 = DISTANCES["cosine"], DISTANCES["l2"]
PLAIN = ScoreOptions(recall_at=(1, 2, 4), verification=False, resamples=0)
SHARED = {
    "precision_at_1": "precision_at_1",
    "r_precision": "r_precision",
    "map_at_r": "mean_average_precision_at_r",
    "mean_reciprocal_rank": "mean_reciprocal_rank",
    "nmi": "NMI",
    "ami": "AMI",
}
"""Our names and the calculator's."""


def calculator_scores(
    queries: Embeddings, gallery: Embeddings | None, name: str, k: int | None = None
) -> dict[str, float]:
    """What pytorch-metric-learning says, of the clusters that we have too."""
    clusters = kmeans_clusters(
        queries.vectors, len(np.unique(queries.labels)), DISTANCES[name], ScoreOptions().seed
    )
    calculator = AccuracyCalculator(
        include=tuple(SHARED.values()),
        k=k,
        device=torch.device("cpu"),
        kmeans_func=lambda vectors, count: torch.from_numpy(clusters),
    )
    # It compares by l2; between unit vectors that is the order of cosines.
    prepare = unit_length if name == "cosine" else np.asarray
    arrays = [prepare(queries.vectors), queries.labels]
    if gallery is not None:
        arrays += [prepare(gallery.vectors), gallery.labels]
    return calculator.get_accuracy(*[torch.from_numpy(np.array(one)) for one in arrays])


def with_lone_classes(seed: int) -> Embeddings:
    base, alone = noisy(seed, 60, 9), noisy(seed + 50, 12, 12)
    vectors = np.concatenate([base.vectors, alone.vectors])
    return samples(vectors, np.concatenate([base.labels, 100 + np.arange(12)]))


CASES = {
    "random": (noisy(0, 70, 12), None),
    "two images a class": (samples(noisy(1, 60, 30).vectors, np.arange(60) // 2), None),
    "lone classes": (with_lone_classes(2), None),
    "one class": (samples(noisy(3, 20, 4).vectors, np.zeros(20)), None),
    "separate gallery": (noisy(4, 40, 14), noisy(5, 80, 10)),
    "gallery of three": (noisy(6, 20, 3), noisy(7, 3, 3)),
}


@pytest.mark.parametrize("name", ["cosine", "l2"])
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_the_twin_and_the_calculator(case: str, name: str) -> None:
    queries, gallery = CASES[case]
    options = ScoreOptions(recall_at=(1, 2, 4), nmi=True, verification=False, resamples=0)
    found = score_everything(queries, gallery, DISTANCES[name], options).scores
    theirs = calculator_scores(queries, gallery, name)
    for ours, other in SHARED.items():
        assert found[ours] == pytest.approx(theirs[other], abs=1e-6), ours
    twin = twin_scores(queries, gallery, name)
    for score, value in twin.items():
        assert found[score] == pytest.approx(value, abs=1e-12), score
    assert set(found) == {*twin, "nmi", "ami"}


@pytest.mark.parametrize("most_unsure", [1.0, -1.0], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["cosine", "l2"])
@pytest.mark.parametrize("case", [*CASES, *TIES])
def test_counted_ranks_are_those_of_the_whole_ranking(
    case: str, name: str, most_unsure: float, monkeypatch
) -> None:
    """Every query by the second pass, also those whose first hit the search has found."""
    monkeypatch.setattr(first_hits, "_MOST_UNSURE", most_unsure)
    monkeypatch.setattr(first_hits, "_TILE_ROWS", 13)
    monkeypatch.setattr(first_hits, "_TILE_COLUMNS", 17)
    queries, gallery = (CASES | TIES)[case]
    searched, distance = queries if gallery is None else gallery, DISTANCES[name]
    scores = score_slice(queries, gallery, slice(0, len(queries)), distance, ())
    unknown = np.zeros(len(queries), dtype=np.int64)
    blank = QueryScores(**{**vars(scores), "first_hit_rank": unknown})
    ranks = complete_first_hits(blank, queries, searched, distance).first_hit_rank
    for i, ranking in enumerate(rankings(queries, gallery, name)):
        hits = [bool(searched.labels[j] == queries.labels[i]) for j in ranking]
        assert ranks[i] == (hits.index(True) + 1 if any(hits) else 0)


def test_a_first_hit_behind_the_searched_neighbours_counts_where_the_calculator_says_zero() -> None:
    # Class 0 at both ends of a line, with 20 classes of one image between.
    line = samples(np.arange(22)[:, None], [0, *range(1, 21), 0])
    found = score_everything(line, None, L2, PLAIN)
    assert found.queries.first_hit_rank[[0, 21]].tolist() == [21, 21]
    assert found.scores["mean_reciprocal_rank"] == pytest.approx(1 / 21)
    assert calculator_scores(line, None, "l2")["mean_reciprocal_rank"] == pytest.approx(1 / 21)
    # With only as many neighbours as it takes for MAP@R, it takes the hit for absent.
    assert calculator_scores(line, None, "l2", k=4)["mean_reciprocal_rank"] == 0
    short = score_slice(line, None, slice(0, 22), L2, (1,))
    with pytest.raises(UsageError, match="first hits of 2 queries stand behind"):
        mean_reciprocal_rank(short)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_first_hits_do_not_depend_on_the_scale_of_the_embeddings(scale: float) -> None:
    base = noisy(9, 60, 20, noise=3.0)
    scaled = samples(base.vectors * np.float32(scale), base.labels, ids=base.ids)
    ranks = score_everything(scaled, None, L2, PLAIN).queries.first_hit_rank
    expected = score_everything(base, None, L2, PLAIN).queries.first_hit_rank
    np.testing.assert_array_equal(ranks, expected)


def test_labels_beyond_float32_stay_apart_where_the_calculator_merges_them() -> None:
    line = samples([[0.0], [1.0], [1.5], [9.0]], [2**24, 2**24 + 1, 2**24, 2**24 + 1])
    assert score_everything(line, None, L2, PLAIN).scores["precision_at_1"] == 0.0
    assert calculator_scores(line, None, "l2")["precision_at_1"] == 1.0


def test_first_hits_are_the_same_for_any_slices_of_the_queries() -> None:
    queries = noisy(8, 90, 30, noise=3.0)
    whole = score_everything(queries, None, COSINE, PLAIN).queries
    parts = []
    for part in (slice(0, 0), slice(0, 41), slice(41, 42), slice(42, 90)):
        scores = score_slice(queries, None, part, COSINE, PLAIN.recall_at)
        parts.append(complete_first_hits(scores, queries.rows(part), queries, COSINE))
    joined = QueryScores.concatenate(parts)
    assert (whole.first_hit_rank > 10).any()
    np.testing.assert_array_equal(joined.first_hit_rank, whole.first_hit_rank)
    with pytest.raises(UsageError, match="do not belong to these 89"):
        complete_first_hits(whole, queries.rows(slice(1, 90)), queries, COSINE)


@pytest.mark.parametrize("text", ["metric(p=0.5)", "probability_l2"])
def test_first_hits_by_class_probabilities_are_those_of_the_whole_ranking(text: str) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(3 * rng.standard_normal((50, 6)))
    vectors = logits.log_softmax(1).float().numpy()
    queries, distance = samples(vectors, rng.integers(0, 20, 50)), named_distance(text)
    found = score_everything(queries, None, distance, ScoreOptions(recall_at=(1,), resamples=0))
    assert found.verification is None  # Only cosine and l2 have one.
    shares = np.exp(vectors.astype(np.float64))
    gaps = np.abs(shares[:, None] - shares[None])
    if distance.parameters is None:
        dense = (gaps**2).sum(axis=2)
    else:
        k, p = distance.parameters.k, distance.parameters.p
        dense = -np.log(1 - k * gaps**p).sum(axis=2)
    for i in np.flatnonzero(found.queries.has_match):
        order = [j for j in np.lexsort((np.arange(50), dense[i])) if j != i]
        hits = queries.labels[order] == queries.labels[i]
        assert found.queries.first_hit_rank[i] == hits.argmax() + 1


@pytest.mark.parametrize("clusters", [1, 2, 17, 300])
def test_ami_equals_scikit_learn(clusters: int) -> None:
    rng = np.random.default_rng(clusters)
    truth = rng.integers(0, 20, 300) * 1000
    found = np.where(rng.random(300) < 0.5, truth % clusters, rng.integers(0, clusters, 300))
    oracle = adjusted_mutual_info_score(truth, found)
    assert adjusted_mutual_information(truth, found) == pytest.approx(oracle, abs=1e-9)


def test_ami_of_a_random_clustering_is_0_where_its_nmi_is_high() -> None:
    rng = np.random.default_rng(0)
    labels, vectors = np.arange(400) // 2, rng.standard_normal((400, 4)).astype(np.float32)
    found = cluster_scores(vectors, labels, L2, 0)
    assert found["nmi"] > 0.8
    assert abs(found["ami"]) < 0.1
    everything = np.arange(10)
    assert adjusted_mutual_information(everything, everything) == 1.0
    assert adjusted_mutual_information(everything, everything * 0) == 0.0


def test_folds_put_side_by_side_have_all_scores() -> None:
    folds = [samples(noisy(seed, 60, 9, noise=2.0).vectors, np.arange(60) % 9) for seed in range(4)]
    joined = concatenate(folds)
    found = score_everything(joined, None, COSINE, PLAIN)
    for score, value in twin_scores(joined, None, "cosine").items():
        assert found.scores[score] == pytest.approx(value, abs=1e-12)
    alone = score_everything(folds[0], None, COSINE, PLAIN)
    assert found.scores["map_at_r"] != alone.scores["map_at_r"]


def test_bad_input_is_refused_and_says_what_is_wrong() -> None:
    queries, gallery = noisy(0, 20, 4), noisy(1, 20, 4)
    twice = samples(gallery.vectors, gallery.labels, ids=np.arange(20) // 2)
    with pytest.raises(UsageError, match="gallery id 50 stands for 20 items"):
        score_everything(
            queries, samples(gallery.vectors, gallery.labels, ids=[50] * 20), L2, PLAIN
        )
    with pytest.raises(UsageError, match="query id 0 stands for 2 items; ids must be unique"):
        score_everything(twice, gallery, L2, PLAIN)
    with pytest.raises(UsageError, match="queries are 8 wide and the gallery 5"):
        score_everything(queries, noisy(1, 20, 4, width=5), L2, PLAIN)
    with pytest.raises(RunError, match="none of 20 queries has another image"):
        score_everything(queries, samples(gallery.vectors, gallery.labels + 50, 5000), L2, PLAIN)
    with pytest.raises(RunError, match="1 of 20 embeddings are not finite"):
        samples(np.where(np.arange(20)[:, None] == 7, np.nan, queries.vectors), queries.labels)
    for options, words in (
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"resamples": -1}, "resamples=-1"),
        ({"false_accept_rates": (0.1, 0.0)}, "false_accept_rates has 0.0"),
        ({"recall_at": (0,)}, "recall_at has 0"),
    ):
        with pytest.raises(UsageError, match=words):
            ScoreOptions(**options)


def test_more_neighbours_than_the_gallery_holds_are_all_looked_at() -> None:
    queries, gallery = noisy(0, 12, 3), noisy(1, 5, 3)
    options = ScoreOptions(recall_at=(1, 50), verification=False, resamples=0)
    found = score_everything(queries, gallery, COSINE, options).scores
    assert found["recall_at_50"] == 1.0
    assert found["recall_at_1"] < 1.0
