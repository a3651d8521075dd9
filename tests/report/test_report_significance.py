"""Paired tests between runs, against plain enumeration and known answers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from dist_dml.errors import UsageError
from dist_dml.report.query_scores import read_query_scores, write_query_scores
from dist_dml.report.significance import holm, paired_test
from dist_dml.retrieval.distances import DISTANCES
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.metrics import QueryScores
from dist_dml.retrieval.protocol import score_slice


def swapped_by_hand(first: np.ndarray, second: np.ndarray, labels: np.ndarray) -> float:
    """The share of all ways to swap the runs within classes whose difference is as large."""
    classes = np.unique(labels)
    observed = abs((second - first).mean())
    reached = 0
    for swaps in itertools.product((False, True), repeat=len(classes)):
        swap = np.isin(labels, classes[np.array(swaps)])
        one, other = np.where(swap, second, first), np.where(swap, first, second)
        reached += abs((other - one).mean()) >= observed - 1e-12
    return reached / 2 ** len(classes)


@pytest.mark.parametrize("seed", range(5))
def test_few_classes_are_tested_exactly_as_by_a_loop_over_all_swaps(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 8, 60)
    first, second = draw.integers(0, 2, (2, 60)).astype(np.float32)
    found = paired_test(first, second, labels)
    assert found.is_exact
    assert found.p == pytest.approx(swapped_by_hand(first, second, labels))
    assert found.difference == pytest.approx(second.mean() - first.mean(), abs=1e-6)
    assert (found.num_queries, found.num_classes) == (60, len(np.unique(labels)))
    back = paired_test(second, first, labels)
    assert (back.p, back.difference) == (found.p, -found.difference)


def test_many_classes_are_sampled_and_near_the_exact_answer() -> None:
    draw = np.random.default_rng(0)
    # 14 classes: one more than are counted, few enough to count here by sums.
    sums = draw.normal(0.25, 1, 14)
    found = paired_test(np.zeros(14), sums, np.arange(14), draws=20_000)
    signs = np.array(list(itertools.product((1, -1), repeat=14)))
    exact = (np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).mean()
    assert not found.is_exact
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4)


def test_runs_that_answer_alike_do_not_differ_and_clear_ones_do() -> None:
    labels = np.repeat(np.arange(40), 5)
    scores = np.random.default_rng(0).random(200)
    same = paired_test(scores, scores, labels)
    assert (same.p, same.difference, same.low, same.high) == (1.0, 0.0, 0.0, 0.0)
    better = paired_test(scores, scores + 0.1, labels)
    assert better.p == pytest.approx(1 / 10_001)
    assert better.low == pytest.approx(0.1) == pytest.approx(better.high)


def test_queries_of_one_class_are_one_observation() -> None:
    # 1,000 queries, all the better, of one class: by queries significant, by classes one coin.
    found = paired_test(np.zeros(1000), np.ones(1000), np.zeros(1000, dtype=np.int64))
    assert found.p == 1.0


def test_equal_runs_are_called_different_as_often_as_promised() -> None:
    draw = np.random.default_rng(1)
    labels = np.repeat(np.arange(12), 3)
    # What is hard for one is hard for the other, and whole classes go one way or the other.
    p = []
    for _ in range(200):
        tilt = draw.normal(0, 1, 12)[labels]
        p.append(paired_test(np.zeros(36), tilt + draw.normal(0, 0.3, 36), labels, draws=10).p)
    assert 0.01 <= np.mean(np.array(p) <= 0.1) <= 0.19


def test_the_interval_is_that_of_classes_drawn_with_replacement() -> None:
    draw = np.random.default_rng(2)
    labels = np.repeat(np.arange(30), draw.integers(1, 9, 30))
    difference = draw.normal(0.3, 1, 30)[labels] + draw.normal(0, 0.1, len(labels))
    found = paired_test(np.zeros(len(labels)), difference, labels)
    means = []
    for _ in range(4000):
        rows = [np.flatnonzero(labels == one) for one in draw.integers(0, 30, 30)]
        means.append(difference[np.concatenate(rows)].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    assert found.low == pytest.approx(low, abs=0.04)
    assert found.high == pytest.approx(high, abs=0.04)


def test_holm_adjusts_in_order_and_never_beyond_one() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("sizes", [(0, 0, 0), (3, 4, 4), (3, 3, 2)])
def test_scores_that_do_not_belong_together_are_refused(sizes: tuple[int, int, int]) -> None:
    arrays = [np.zeros(size) for size in sizes]
    with pytest.raises(UsageError, match="the same queries"):
        paired_test(arrays[0], arrays[1], arrays[2].astype(np.int64))


def some_scores() -> tuple[np.ndarray, QueryScores]:
    draw = np.random.default_rng(0)
    labels = np.array([0, 0, 0, 1, 1, 2])
    samples = Embeddings(draw.normal(size=(6, 3)).astype(np.float32), labels, np.arange(6) * 7 + 2)
    scores = score_slice(samples, None, slice(0, 6), DISTANCES["cosine"], (1,))
    return samples.ids, scores


def test_scores_of_single_queries_come_back_in_the_order_of_their_ids(tmp_path: Path) -> None:
    ids, scores = some_scores()
    backwards = QueryScores(
        recall_at=scores.recall_at,
        **{
            name: getattr(scores, name)[::-1].copy()
            for name in QueryScores.__dataclass_fields__
            if name != "recall_at"
        },
    )
    path = tmp_path / "queries.parquet"
    found = {("unseen", "cosine"): (ids, scores), ("seen", "l2"): (ids[::-1].copy(), backwards)}
    write_query_scores(path, found, {"unseen": ("test", ""), "seen": ("a", "b")}, "data", "step-1")
    stored = read_query_scores(path)
    assert (stored.fingerprint, stored.checkpoint) == ("data", "step-1")
    assert stored.protocols == {"unseen": ["test", ""], "seen": ["a", "b"]}
    assert list(stored.found) == [("unseen", "cosine"), ("seen", "l2")]
    for one in stored.found.values():
        assert one.ids.tolist() == ids.tolist()
        assert one.labels.tolist() == scores.query_label.tolist()
        assert one.has_match.tolist() == scores.has_match.tolist()
        np.testing.assert_allclose(one.scores["recall_at_1"], scores.precision_at_1)
        np.testing.assert_allclose(one.scores["map_at_r"], scores.map_at_r, rtol=1e-6)
        np.testing.assert_allclose(one.scores["r_precision"], scores.r_precision, rtol=1e-6)


def test_a_damaged_or_foreign_file_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "queries.parquet"
    pyarrow.parquet.write_table(pa.table({"id": [1]}), path)
    with pytest.raises(UsageError, match=r"its format is None.*dist-dml evaluate"):
        read_query_scores(path)
    ids, scores = some_scores()
    write_query_scores(path, {("a", "b"): (ids, scores)}, {"a": ("x", "")}, "data", "c")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match=r"cannot read queries\.parquet.*dist-dml evaluate"):
        read_query_scores(path)
