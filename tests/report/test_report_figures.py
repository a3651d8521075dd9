"""What the figures show, against counts made by hand or by plain loops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from dist_dml.losses.diagnostics import covering_radius
from dist_dml.report.class_sizes import class_points, class_size_figure, ends_of
from dist_dml.report.confusions import confusions
from dist_dml.report.covering import reach_figure, reach_of_classes
from dist_dml.report.embedding_map import MOST_OF_A_CLASS, choose_points, map_figure, plane
from dist_dml.report.pair_histogram import bars_of, pair_figure, threshold_rows
from dist_dml.retrieval.distances import DISTANCES
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.groups import class_sizes, scores_by_class_size
from dist_dml.retrieval.metrics import QueryScores
from dist_dml.retrieval.protocol import score_slice
from dist_dml.retrieval.verification import verify_pairs


def some_embeddings(seed: int, num: int = 90, classes: int = 7, width: int = 4) -> Embeddings:
    """Overlapping classes of uneven sizes; one class has a single image."""
    draw = np.random.default_rng(seed)
    labels = np.sort(draw.integers(0, classes, num))
    labels[-1] = classes + 3
    centres = draw.normal(0, 1, (classes + 4, width))
    vectors = (centres[labels] + draw.normal(0, 0.9, (num, width))).astype(np.float32)
    return Embeddings(vectors, labels.astype(np.int64), np.arange(num) * 3 + 5)


def scores_of(samples: Embeddings, name: str = "cosine") -> QueryScores:
    return score_slice(samples, None, slice(0, len(samples)), DISTANCES[name], (1, 2))


@pytest.mark.parametrize("seed", range(4))
def test_confusions_are_those_that_a_loop_counts_most_first(seed: int) -> None:
    scores = scores_of(some_embeddings(seed))
    counted: Counter[tuple[int, int]] = Counter()
    sizes: Counter[int] = Counter()
    examples: dict[tuple[int, int], int] = {}
    rows = zip(scores.query_label, scores.nearest_label, scores.has_match, strict=True)
    for row, (label, other, answerable) in enumerate(rows):
        sizes[int(label)] += int(answerable)
        if answerable and label != other:
            counted[int(label), int(other)] += 1
            examples.setdefault((int(label), int(other)), row)
    found = confusions(scores, 1000)
    assert found, "these classes overlap"
    assert {(one.label, one.taken_for): one.count for one in found} == counted
    for one in found:
        assert one.num_queries == sizes[one.label]
        assert one.example == examples[one.label, one.taken_for]
    keys = [(-one.count, -one.count / one.num_queries, one.label) for one in found]
    assert keys == sorted(keys)
    assert confusions(scores, 2) == found[:2]


def test_perfect_neighbours_and_lone_queries_make_no_confusion() -> None:
    vectors = np.array([[0.0], [0.1], [5.0], [5.1], [9.0]], np.float32)
    samples = Embeddings(vectors, np.array([0, 0, 1, 1, 2]), np.arange(5))
    assert confusions(scores_of(samples, "l2"), 5) == []


def test_class_points_are_means_of_classes_and_the_figure_takes_groups_without_scores() -> None:
    samples = some_embeddings(1)
    scores, sizes = scores_of(samples), class_sizes(samples.labels)
    points = class_points(scores, sizes)
    for place, label in enumerate(points.labels):
        own = (samples.labels == label) & scores.has_match
        assert points.size[place] == (samples.labels == label).sum()
        assert points.recall_at_1[place] == pytest.approx(scores.precision_at_1[own].mean())
    assert samples.labels[-1] not in points.labels, "a lone query has no score"
    groups = scores_by_class_size(scores, sizes)
    assert groups[0].scores == {}
    assert ends_of(groups[0]) == (1, 1)
    assert all(low <= high < 2 * low for low, high in map(ends_of, groups[1:]))
    (axes,) = class_size_figure(groups, points, 0).axes
    drawn = axes.get_lines()[0].get_ydata()
    answered = [group.scores["recall_at_1"] for group in groups if group.scores]
    np.testing.assert_allclose(np.asarray(drawn), answered)


def test_the_map_shows_a_bounded_seeded_choice_with_the_largest_classes() -> None:
    labels = np.repeat(np.arange(500), 10)
    labels[:300] = 7
    points = choose_points(labels, 3, most=400)
    assert len(points.rows) == len(np.unique(points.rows)) == 400
    assert points.coloured[0] == 7
    shown = labels[points.rows]
    assert (shown == 7).sum() >= min(MOST_OF_A_CLASS, 400 // 24)
    assert all((shown == label).sum() == 10 for label in points.coloured[1:])
    assert np.array_equal(points.rows, choose_points(labels, 3, most=400).rows)
    assert not np.array_equal(points.rows, choose_points(labels, 4, most=400).rows)
    assert len(choose_points(labels[:50], 3).rows) == 50


def test_the_map_keeps_far_classes_apart_and_is_the_same_again() -> None:
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 12)
    vectors = draw.normal(0, 0.05, (36, 5)).astype(np.float32)
    vectors[np.arange(36), labels] += 3
    places = plane(vectors, seed=1)
    assert np.array_equal(places, plane(vectors, seed=1))
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    assert (labels[apart.argmin(axis=1)] == labels).all()
    figure = map_figure(places, labels, (0, 1), {0: "a $ b $ c", 1: "_\u4e2d"})
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["a $ b $ c (12)", "? (12)"]


@pytest.mark.parametrize("vectors", [np.zeros((5, 3)), np.ones((20, 3))])
def test_what_has_no_map_says_why(vectors: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"images says nothing|same point"):
        plane(vectors.astype(np.float32), 0)


def test_radii_and_next_centres_of_classes_on_a_line() -> None:
    # Class 0: 0, 1, 2 (centre 1, radius 1). Class 1: 10, 11, 16 (centre 11, radius 5). Class 2:
    # 13, 14, 15 (centre 14, radius 1): next to class 1's centre, which 16 of class 1 goes beyond.
    places = [0, 1, 2, 10, 11, 16, 13, 14, 15, 99]
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    reach = reach_of_classes(np.array(places, np.float32)[:, None], labels)
    assert reach is not None
    assert reach.labels.tolist() == [0, 1, 2], "a single image has no radius"
    np.testing.assert_allclose(reach.radius, [1, 5, 1])
    np.testing.assert_allclose(reach.next_centre, [10, 3, 3])
    assert reach.num_overlapping == 1
    rows = torch.tensor(places[:9], dtype=torch.float32)[:, None]
    expected = float(covering_radius(rows, torch.from_numpy(labels[:9])))
    assert reach.mean_radius == pytest.approx(expected)
    pairs = [abs(a - b) for i, a in enumerate(places[:9]) for j, b in enumerate(places[:9])
             if labels[i] != labels[j]]  # fmt: skip
    assert reach.inter_class == pytest.approx(np.mean(pairs))
    drawn = [len(c.get_offsets()) for c in reach_figure(reach, "x").axes[0].collections]
    assert drawn == [2, 1]
    assert reach_of_classes(np.zeros((4, 2), np.float32), np.arange(4)) is None


@pytest.mark.parametrize("name", ["cosine", "l2"])
def test_histograms_lose_no_pair_and_stand_at_the_pairs_values(name: str) -> None:
    samples, distance = some_embeddings(2, num=150), DISTANCES[name]
    found = verify_pairs(samples, None, distance, 0)
    bars = bars_of(found.counts, found.larger_is_nearer, num_bars=25)
    assert len(bars.genuine) == len(bars.impostor) == len(bars.edges) - 1 <= 26
    assert bars.genuine.sum() == pytest.approx(1)
    assert bars.impostor.sum() + bars.impostor_beyond == pytest.approx(1)
    vectors = distance.prepare(samples.vectors).astype(np.float64)
    values = vectors @ vectors.T
    if name == "l2":
        values = np.square(vectors[:, None] - vectors[None]).sum(axis=2)
    upper = np.triu(np.ones_like(values, dtype=bool), 1)
    alike = samples.labels[:, None] == samples.labels[None]
    for kind, shares in ((upper & alike, bars.genuine), (upper & ~alike, bars.impostor)):
        counted = np.histogram(values[kind], bars.edges)[0] / kind.sum()
        # Values within float32's rounding of an edge may be on its other side.
        np.testing.assert_allclose(shares, counted, atol=2.5 / kind.sum())
    figure = pair_figure(found, distance)
    best = found.best_threshold()[0]
    assert any(line.get_xdata()[0] == best for line in figure.axes[0].get_lines())


def test_the_table_of_thresholds_says_where_there_are_too_few_pairs() -> None:
    found = verify_pairs(some_embeddings(2), None, DISTANCES["cosine"], 0)
    rows = {name: (value, gives) for name, value, gives in threshold_rows(found, (0.1, 1e-4))}
    assert rows["FAR 0.1"][1] == f"TAR {found.tar_at_far(0.1):.2%}"
    assert rows["FAR 0.0001"][1] == "too few wrong pairs to tell"
