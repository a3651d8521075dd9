"""Bootstrap intervals over classes, and scores of groups of queries."""

import numpy as np
import pytest
from full_score_cases import noisy, samples

from dist_dml.errors import UsageError
from dist_dml.retrieval import intervals
from dist_dml.retrieval.distances import DISTANCES
from dist_dml.retrieval.full_scores import ScoreOptions, score_everything
from dist_dml.retrieval.groups import (
    class_sizes,
    scores_by_class,
    scores_by_class_size,
    scores_by_group,
)
from dist_dml.retrieval.intervals import class_sums, difference_intervals, score_intervals
from dist_dml.retrieval.metrics import QueryScores, macro_f1, score_queries, summarise

L2 = DISTANCES["l2"]
OPTIONS = ScoreOptions(recall_at=(1, 4), verification=False, resamples=0)


def hits_of(hits: np.ndarray, labels: np.ndarray) -> QueryScores:
    """Queries whose only own gallery image is found first, or second."""
    labels = labels.astype(np.int64)
    other = labels.max() + 1
    rows = np.where(hits[:, None], np.stack([labels, labels * 0 + other], axis=1), other)
    rows[~hits, 1] = labels[~hits]
    return score_queries(rows, labels, np.ones(len(labels), np.int64), (1, 2))


def drawn_classes(seed: int, count: int = 40, size: int = 12) -> QueryScores:
    """Queries of a class succeed or fail together: the share of hits is drawn for each class."""
    rng = np.random.default_rng(seed)
    share = rng.beta(0.7, 0.7, count)
    labels = np.repeat(np.arange(count), size)
    return hits_of(rng.random(count * size) < share[labels], labels)


def test_scores_lie_in_their_intervals_and_intervals_are_those_of_a_plain_loop() -> None:
    queries = score_everything(noisy(0, 150, 25), None, L2, OPTIONS).queries
    found = score_intervals(queries, 4000, 0.9, seed=1)
    kept = queries.has_match
    labels = queries.query_label[kept]
    classes, rng = np.unique(labels), np.random.default_rng(5)
    rows_of = {one: np.flatnonzero(labels == one) for one in classes.tolist()}
    f1 = {one: macro_f1_of(one, labels, queries.nearest_label[kept]) for one in classes.tolist()}
    means = {name: [] for name in found}
    ranks = 1 / queries.first_hit_rank[kept]
    for _ in range(3000):
        chosen = rng.choice(classes, len(classes))
        rows = np.concatenate([rows_of[one] for one in chosen.tolist()])
        means["map_at_r"].append(queries.map_at_r[kept][rows].mean())
        means["r_precision"].append(queries.r_precision[kept][rows].mean())
        means["precision_at_1"].append(queries.precision_at_1[kept][rows].mean())
        means["recall_at_1"].append(queries.recall_hits[kept][rows, 0].mean())
        means["recall_at_4"].append(queries.recall_hits[kept][rows, 1].mean())
        means["mean_reciprocal_rank"].append(ranks[rows].mean())
        means["f1_at_1"].append(np.mean([f1[one] for one in chosen.tolist()]))
    scores = class_sums(queries).means()
    for name, values in means.items():
        low, high = found[name]
        assert low < scores[name] < high
        np.testing.assert_allclose([low, high], np.quantile(values, [0.05, 0.95]), atol=0.012)
    for name, value in summarise(queries).items():
        assert name.startswith("num_") or scores[name] == pytest.approx(value, abs=1e-12)


def macro_f1_of(one: int, truth: np.ndarray, prediction: np.ndarray) -> float:
    both = int(((truth == one) & (prediction == one)).sum())
    return 2 * both / int((truth == one).sum() + (prediction == one).sum())


def test_intervals_cover_the_truth_where_those_of_single_queries_do_not() -> None:
    covered = {"classes": 0, "queries": 0}
    for seed in range(100):
        scores = drawn_classes(seed)
        low, high = score_intervals(scores, 300, 0.9, seed)["precision_at_1"]
        covered["classes"] += low <= 0.5 <= high
        # The same queries, each a class of its own: as if they were independent.
        alone = hits_of(scores.precision_at_1 > 0, np.arange(len(scores.query_label)))
        low, high = score_intervals(alone, 300, 0.9, seed)["precision_at_1"]
        covered["queries"] += low <= 0.5 <= high
    assert covered["classes"] >= 80
    assert covered["queries"] <= 60


def test_intervals_are_the_same_for_any_workers_seeds_decide_and_memory_does_not(
    monkeypatch,
) -> None:
    scores = drawn_classes(0)
    whole = score_intervals(scores, 200, 0.95, 7)
    cuts = [slice(0, 100), slice(100, 101), slice(101, 480)]
    fields = [name for name in QueryScores.__dataclass_fields__ if name != "recall_at"]
    parts = [
        QueryScores(scores.recall_at, **{name: getattr(scores, name)[cut] for name in fields})
        for cut in cuts
    ]
    assert score_intervals(QueryScores.concatenate(parts), 200, 0.95, 7) == whole
    assert score_intervals(scores, 200, 0.95, 8) != whole
    monkeypatch.setattr(intervals, "_NUMBERS_AT_A_TIME", 100)
    assert score_intervals(scores, 200, 0.95, 7) == whole


def test_more_confidence_is_wider_and_one_class_has_no_interval() -> None:
    scores = drawn_classes(1)
    narrow, wide = (score_intervals(scores, 400, c, 0)["map_at_r"] for c in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert score_intervals(scores, 0, 0.95, 0) == {}
    single = hits_of(np.array([True, False]), np.zeros(2))
    assert score_intervals(single, 100, 0.95, 0) == {}
    lone = score_queries(np.full((2, 2), 9), np.array([1, 2]), np.zeros(2, np.int64), (1,))
    assert score_intervals(lone, 100, 0.95, 0) == {}
    with pytest.raises(UsageError, match="confidence=95"):
        score_intervals(scores, 100, 95, 0)


def test_a_paired_difference_is_known_better_than_two_scores() -> None:
    first = drawn_classes(2)
    better = first.precision_at_1 > 0
    better[::10] = True  # A tenth of the queries right, whatever the class.
    second = hits_of(better, first.query_label)
    difference, low, high = difference_intervals(first, second, 500, 0.95, 0)["precision_at_1"]
    assert difference == pytest.approx(second.precision_at_1.mean() - first.precision_at_1.mean())
    assert 0 < low < difference < high
    ends = [score_intervals(one, 500, 0.95, 0)["precision_at_1"] for one in (first, second)]
    assert ends[1][0] < ends[0][1]  # The two intervals overlap.
    same = difference_intervals(first, first, 500, 0.95, 0)
    assert set(same.values()) == {(0.0, 0.0, 0.0)}
    with pytest.raises(UsageError, match="needs the same classes"):
        difference_intervals(first, drawn_classes(2, count=39), 500, 0.95, 0)


def test_groups_are_means_of_their_queries_and_add_up_to_the_whole() -> None:
    base = noisy(3, 120, 30)
    whole = score_everything(base, None, L2, OPTIONS)
    colour = np.array(["red", "blue", "green"])[np.arange(120) % 3]
    rows = scores_by_group(whole.queries, colour)
    assert [row.name for row in rows] == ["blue", "green", "red"]
    assert sum(row.num_queries for row in rows) == 120
    for name in ("recall_at_1", "recall_at_4", "map_at_r", "mean_reciprocal_rank"):
        answered = [row.num_queries - row.num_queries_without_match for row in rows]
        mean = np.average([row.scores[name] for row in rows], weights=answered)
        assert mean == pytest.approx(whole.scores[name])
    red = (colour == "red") & whole.queries.has_match
    assert rows[2].scores["map_at_r"] == pytest.approx(whole.queries.map_at_r[red].mean())
    assert rows[2].num_classes == len(np.unique(base.labels[colour == "red"]))


def test_each_class_has_its_own_row_and_lone_ones_have_no_scores() -> None:
    base = samples(noisy(4, 9, 3).vectors, [5, 5, 5, 5, 2, 2, 2, 7, 9])
    queries = score_everything(base, None, L2, OPTIONS).queries
    rows = scores_by_class(queries, {5: "five", 2: "two"})
    assert [(row.name, row.num_queries) for row in rows] == [
        ("two", 3),
        ("five", 4),
        ("7", 1),
        ("9", 1),
    ]
    assert rows[1].scores["map_at_r"] == pytest.approx(queries.map_at_r[:4].mean())
    assert (rows[2].scores, rows[2].num_queries_without_match) == ({}, 1)


def test_sizes_of_classes_are_binned_by_powers_of_two() -> None:
    counts = [1, 2, 3, 4, 7, 8, 16]
    labels = np.repeat(np.arange(7), counts)
    base = samples(noisy(5, sum(counts), 4).vectors, labels)
    sizes = class_sizes(base.labels)
    np.testing.assert_array_equal(sizes, np.repeat(counts, counts))
    queries = score_everything(base, None, L2, OPTIONS).queries
    rows = scores_by_class_size(queries, sizes)
    found = [(row.name, row.num_queries, row.num_classes) for row in rows]
    assert found == [("1", 1, 1), ("2-3", 5, 2), ("4-7", 11, 2), ("8-15", 8, 1), ("16-31", 16, 1)]
    gallery = base.rows(np.flatnonzero(labels != 3))
    absent = class_sizes(base.labels, gallery.labels)
    assert absent[labels == 3].tolist() == [0] * 4
    assert scores_by_class_size(queries, absent)[0].name == "0"


def test_columns_may_miss_values_mix_types_and_must_fit() -> None:
    queries = score_everything(noisy(6, 8, 2), None, L2, OPTIONS).queries
    nan = float("nan")
    rows = scores_by_group(queries, [3, None, nan, 3, 10, 10, 2.5, None])
    assert [(row.name, row.num_queries) for row in rows] == [
        ("2.5", 1),
        ("3", 2),
        ("10", 2),
        ("(missing)", 3),
    ]
    mixed = scores_by_group(queries, ["a", 1, True, "b", [1], [1], "a", b"x"])
    assert sum(row.num_queries for row in mixed) == 8
    with pytest.raises(UsageError, match="7 values of a column do not group 8 queries"):
        scores_by_group(queries, ["a"] * 7)


def test_f1_of_classes_averages_to_the_score() -> None:
    queries = score_everything(noisy(7, 60, 9), None, L2, OPTIONS).queries
    kept = queries.has_match
    f1 = macro_f1(queries.query_label[kept], queries.nearest_label[kept])
    assert class_sums(queries).means()["f1_at_1"] == pytest.approx(f1, abs=1e-12)
