"""Verification against plain loops over all pairs, scikit-learn, and held-out classes."""

import numpy as np
import pytest
from full_score_cases import integers, noisy, samples, twin_pairs
from sklearn.metrics import roc_auc_score, roc_curve

from dist_dml.errors import UsageError
from dist_dml.retrieval import pair_counts
from dist_dml.retrieval.distances import DISTANCES, named_distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.full_scores import ScoreOptions, score_everything
from dist_dml.retrieval.verification import Verification, verify_pairs

COSINE, L2 = DISTANCES["cosine"], DISTANCES["l2"]
NAMES = ["cosine", "l2"]
EVERYTHING = noisy(1, 70, 9)
CASES = {
    "among themselves": (noisy(0, 80, 9), None),
    "separate gallery": (noisy(2, 40, 9), noisy(3, 60, 12)),
    "a gallery that holds the queries": (EVERYTHING.rows(np.arange(10, 40)), EVERYTHING),
    "ties": (integers(4, 60, 6), None),
    "lone classes": (samples(noisy(5, 40, 5).vectors, [*range(20), *range(10), *range(10)]), None),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_counts_are_those_of_a_loop_over_all_pairs(case: str, name: str, monkeypatch) -> None:
    # Tiles that do not divide the numbers of queries and items.
    monkeypatch.setattr(pair_counts, "_TILE_ROWS", 7)
    monkeypatch.setattr(pair_counts, "_TILE_COLUMNS", 11)
    queries, gallery = CASES[case]
    genuine, impostor = twin_pairs(queries, gallery, name)
    counts = verify_pairs(queries, gallery, DISTANCES[name]).counts
    assert (counts.totals.genuine, counts.totals.impostor) == (len(genuine), len(impostor))
    np.testing.assert_allclose(counts.genuine_values, genuine, atol=1e-6)
    for found, values in ((counts.genuine, genuine), (counts.impostor, impostor)):
        assert found.sum() == len(values)
        # So many lie below each edge, give or take those that rounding may move across it.
        below = np.concatenate([[0], np.cumsum(found)])[1:-1]
        slack = 2e-5 * max(1.0, abs(counts.edges[-1]))
        edges = counts.edges[1:-1]
        assert (below >= np.searchsorted(values, edges - slack)).all()
        assert (below <= np.searchsorted(values, edges + slack)).all()


def share_accepted(values: np.ndarray, threshold: float, name: str) -> float:
    return float(np.mean(values >= threshold if name == "cosine" else values <= threshold))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_rates_are_those_of_the_pairs_and_of_scikit_learn(case: str, name: str) -> None:
    queries, gallery = CASES[case]
    genuine, impostor = (np.array(one) for one in twin_pairs(queries, gallery, name))
    found = verify_pairs(queries, gallery, DISTANCES[name])
    truth = np.repeat([1, 0], [len(genuine), len(impostor)])
    # Equal ones must be equal for scikit-learn too.
    nearness = np.round(np.concatenate([genuine, impostor]), 6) * (1 if name == "cosine" else -1)
    assert found.roc_auc() == pytest.approx(roc_auc_score(truth, nearness), abs=2e-4)
    far, tar, _ = roc_curve(truth, nearness, drop_intermediate=False)
    for rate in (0.5, 0.1, 0.02):
        reached = found.tar_at_far(rate)
        threshold = found.threshold_at_far(rate)
        assert reached is not None
        assert threshold is not None
        assert reached == pytest.approx(tar[far <= rate].max(), abs=0.01)
        assert share_accepted(impostor, threshold, name) <= rate + 1e-9
        assert reached == pytest.approx(share_accepted(genuine, threshold, name), abs=1e-9)
    crossing = float(np.interp(0.0, far - (1 - tar), far))
    assert found.equal_error_rate() == pytest.approx(crossing, abs=0.01)
    threshold, accuracy = found.best_threshold()
    best = float(((tar + 1 - far) / 2).max())
    assert accuracy == pytest.approx(best, abs=2e-3)
    refused = 1 - share_accepted(impostor, threshold, name)
    there = (share_accepted(genuine, threshold, name) + refused) / 2
    assert there == pytest.approx(accuracy, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_separated_classes_are_told_apart_by_a_threshold_in_the_gap(name: str) -> None:
    vectors = np.repeat(np.eye(3), 4, axis=0) + 0.01 * np.arange(12)[:, None]
    found = verify_pairs(samples(vectors, np.arange(12) // 4), None, DISTANCES[name])
    threshold, accuracy = found.best_threshold()
    genuine, impostor = twin_pairs(samples(vectors, np.arange(12) // 4), None, name)
    ends = (impostor[-1], genuine[0]) if name == "cosine" else (genuine[-1], impostor[0])
    assert ends[0] < threshold < ends[1]
    assert (accuracy, found.roc_auc(), found.equal_error_rate()) == (1.0, 1.0, 0.0)


def test_duplicates_of_other_classes_count_half() -> None:
    # All values are the same: nothing tells genuine from impostor pairs.
    same = samples(np.ones((8, 3)), np.arange(8) // 2)
    for distance in (COSINE, L2):
        found = verify_pairs(same, None, distance)
        assert found.roc_auc() == pytest.approx(0.5)
        assert found.best_threshold()[1] == 0.5
        assert found.equal_error_rate() == pytest.approx(0.5)
        np.testing.assert_allclose(found.probability_same(found.counts.genuine_values), 4 / 28)


def test_a_far_with_too_few_impostors_has_no_score() -> None:
    options = ScoreOptions(false_accept_rates=(1e-1, 1e-2, 1e-3), resamples=0)
    found = score_everything(noisy(0, 60, 9), None, COSINE, options)
    assert 1000 < found.scores["num_impostor_pairs"] < 10_000
    assert {"tar_at_far_0.1", "tar_at_far_0.01"} < set(found.scores)
    assert "tar_at_far_0.001" not in found.scores
    assert found.verification is not None
    assert found.verification.tar_at_far(1e-3) is None
    assert found.verification.threshold_at_far(1e-3) is None
    assert np.isfinite(list(found.scores.values())).all()


@pytest.mark.parametrize("gallery", [None, noisy(7, 300, 20)])
def test_too_many_pairs_are_drawn_by_the_seed_and_said_to_be(gallery: Embeddings | None) -> None:
    queries = noisy(6, 300, 20)
    whole = verify_pairs(queries, gallery, COSINE)
    assert not whole.is_sampled
    drawn = verify_pairs(queries, gallery, COSINE, 3, most_impostors=12_000)
    again = verify_pairs(queries, gallery, COSINE, 3, most_impostors=12_000)
    other = verify_pairs(queries, gallery, COSINE, 4, most_impostors=12_000)
    assert drawn.is_sampled
    assert drawn.counts.totals == whole.counts.totals
    assert 0 < drawn.counts.impostor.sum() <= 12_000
    np.testing.assert_array_equal(drawn.counts.impostor, again.counts.impostor)
    assert (drawn.counts.impostor != other.counts.impostor).any()
    # Genuine pairs are few and all there; of the impostors' share an estimate.
    np.testing.assert_allclose(drawn.counts.genuine_values, whole.counts.genuine_values)
    assert drawn.roc_auc() == pytest.approx(whole.roc_auc(), abs=0.03)
    # Each pair with a drawn end once.
    count = drawn.counts.queries_of_impostors
    pairs = count * 300 if gallery else count * 300 - count * (count + 1) // 2
    assert drawn.counts.impostor.sum() == pytest.approx(pairs * (1 - whole.prior), rel=0.05)
    few = verify_pairs(queries, gallery, COSINE, 3, most_genuine=500)
    assert few.is_sampled
    assert 100 < len(few.counts.genuine_values) <= 500


def fit_and_test(distance, seed: int) -> tuple[Verification, np.ndarray, np.ndarray]:
    """Fitted on 60 classes; values and truth of the pairs of 60 others with the same spread."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(2):
        centres = rng.standard_normal((60, 16))
        vectors = np.repeat(centres, 10, axis=0) + 0.9 * rng.standard_normal((600, 16))
        parts.append(samples(vectors, np.arange(600) // 10))
    other = verify_pairs(parts[1], None, distance).counts
    middle = (other.edges[1:] + other.edges[:-1]) / 2
    values = np.concatenate([np.repeat(middle, other.genuine), np.repeat(middle, other.impostor)])
    truth = np.repeat([1.0, 0.0], [other.genuine.sum(), other.impostor.sum()])
    return verify_pairs(parts[0], None, distance), values, truth


@pytest.mark.parametrize("distance", [COSINE, L2], ids=NAMES)
def test_probabilities_hold_for_classes_that_they_were_not_made_from(distance) -> None:
    """Of the pairs that are said to be of one class with probability P, a share P is."""
    found, values, truth = fit_and_test(distance, 0)
    said = found.probability_same(values)
    groups = np.digitize(said, [0.003, 0.01, 0.03, 0.1, 0.3, 0.6])
    seen = 0
    for group in range(7):
        inside = groups == group
        if truth[inside].sum() < 100:
            continue
        seen += 1
        assert truth[inside].mean() == pytest.approx(said[inside].mean(), rel=0.25)
    assert seen >= 5
    # Not a fixed answer: better than the share of genuine pairs, by the proper Brier score.
    assert np.mean((said - truth) ** 2) < 0.9 * np.mean((found.prior - truth) ** 2)


@pytest.mark.parametrize("distance", [COSINE, L2], ids=NAMES)
def test_probabilities_are_monotone_and_keep_the_share_of_genuine_pairs(distance) -> None:
    found, _, _ = fit_and_test(distance, 1)
    counts = found.counts
    middle = (counts.edges[1:] + counts.edges[:-1]) / 2
    probability = found.probability_same(middle)
    step = np.diff(probability) * (1 if found.larger_is_nearer else -1)
    assert (step >= 0).all()
    pairs = counts.genuine + counts.impostor
    assert (probability * pairs).sum() == pytest.approx(counts.genuine.sum(), rel=1e-9)
    nearest = 1.0 if found.larger_is_nearer else 0.0
    farthest = -1.0 if found.larger_is_nearer else 1e9
    ends = found.probability_same(np.array([nearest, farthest]))
    assert ends[0] > 0.5
    assert ends[1] < found.prior


def test_another_prior_moves_probabilities_by_bayes() -> None:
    found, _, _ = fit_and_test(COSINE, 2)
    values = np.linspace(-0.5, 0.95, 30)
    plain, same = found.probability_same(values), found.probability_same(values, found.prior)
    np.testing.assert_allclose(plain, same, atol=1e-12)
    half = found.probability_same(values, 0.5)
    inside = (plain > 0) & (plain < 1)
    odds = half[inside] / (1 - half[inside]) * found.prior / (1 - found.prior)
    np.testing.assert_allclose(odds, plain[inside] / (1 - plain[inside]), rtol=1e-9)
    with pytest.raises(UsageError, match="prior=1 is no share"):
        found.probability_same(values, 1)


def test_probabilities_of_drawn_pairs_have_the_share_of_all_pairs() -> None:
    queries = noisy(6, 400, 40)
    whole = verify_pairs(queries, None, COSINE)
    drawn = verify_pairs(queries, None, COSINE, 1, most_impostors=20_000)
    values = np.linspace(0.2, 0.9, 8)
    difference = drawn.probability_same(values) - whole.probability_same(values)
    assert np.abs(difference).max() < 0.1
    assert drawn.prior == whole.prior


def test_what_cannot_be_verified_is_refused_or_left_out() -> None:
    queries = noisy(0, 20, 4)
    one_class = samples(queries.vectors, np.zeros(20))
    with pytest.raises(UsageError, match="make no pair of different classes"):
        verify_pairs(one_class, None, COSINE)
    with pytest.raises(UsageError, match="make no pair of the same class"):
        verify_pairs(samples(queries.vectors, np.arange(20)), None, COSINE)
    found = score_everything(one_class, None, COSINE, ScoreOptions(resamples=0))
    assert found.verification is None
    assert "best_threshold" not in found.scores
    with pytest.raises(UsageError, match=r"computed for cosine and l2"):
        verify_pairs(queries, None, named_distance("metric(p=0.5)"))
    with pytest.raises(UsageError, match="queries are 8 wide and the gallery 5"):
        verify_pairs(queries, noisy(1, 20, 4, width=5), L2)
    with pytest.raises(UsageError, match="has label"):
        verify_pairs(queries, samples(queries.vectors, queries.labels + 1, ids=queries.ids), L2)
    with pytest.raises(UsageError, match="too large for float32"):
        verify_pairs(samples(queries.vectors * 1e18, queries.labels), None, L2)
    with pytest.raises(UsageError, match=r"false_accept_rates has 1\.5"):
        verify_pairs(queries, None, L2).tar_at_far(1.5)
