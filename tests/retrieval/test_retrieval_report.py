"""Figures and the table: which rows they choose and what they show."""

import io

import matplotlib.colors
import numpy as np
import pytest

from dist_dml.errors import UsageError
from dist_dml.retrieval.distances import DISTANCES
from dist_dml.retrieval.protocol import Embeddings
from dist_dml.retrieval.report import (
    HIT_COLOUR,
    MISS_COLOUR,
    choose_rows,
    recall_curve,
    retrieval_gallery,
    score_table,
)

L2 = DISTANCES["l2"]


def on_a_line() -> Embeddings:
    """Pairs of classes 0..4 side by side, and classes 5, 6 interleaved so that each misses.

    Class 6's member at 200.6 is nearest to 5's at 200: the most confident miss. Class 7 is alone.
    """
    places = [0, 1, 20, 21, 40, 41, 60, 61, 80, 81, 200, 206, 200.6, 212, 300]
    labels = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]
    vectors = np.array(places, np.float32)[:, None]
    return Embeddings(vectors, np.array(labels), np.arange(15) + 100)


def test_hardest_misses_come_first_then_random_queries_none_twice():
    rows = choose_rows(on_a_line(), None, L2, num_rows=8, num_neighbours=1, seed=0)
    assert rows.num_hardest == 4
    assert set(rows.queries[:2]) == {10, 12}
    assert set(rows.queries[2:4]) == {11, 13}
    assert not rows.hits[:4, 0].any()
    assert rows.hits[4:, 0].all()
    assert len(set(rows.queries)) == 8
    assert 14 not in rows.queries


def test_the_seed_decides_the_random_rows_and_misses_that_lack_are_replaced():
    samples = on_a_line()
    rows, again, other = (choose_rows(samples, None, L2, 12, 3, seed).queries for seed in (0, 0, 1))
    np.testing.assert_array_equal(rows, again)
    assert (rows != other).any()
    easy = samples.rows(slice(0, 10))
    rows = choose_rows(easy, None, L2, num_rows=6, num_neighbours=3, seed=0)
    assert (rows.num_hardest, len(rows.queries)) == (0, 6)


def test_the_gallery_frames_hits_green_and_misses_red():
    samples = on_a_line()
    asked: list[int] = []

    def load_image(sample_id: int) -> np.ndarray:
        asked.append(sample_id)
        shape = (8, 8) if sample_id % 3 == 0 else (8, 8, 1) if sample_id % 3 == 1 else (8, 8, 3)
        return np.full(shape, sample_id, np.uint8)

    names = {0: "price in $ and $", 1: "caf\u00e9", 5: "LATIN SMALL LETTER A WITH DIAERESIS"}
    figure = retrieval_gallery(
        samples, None, L2, load_image, names, num_rows=6, num_neighbours=2, title="$ a $ title"
    )
    rows = choose_rows(samples, None, L2, 6, 2, 0)
    expected = [
        sample
        for query, found in zip(rows.queries, rows.neighbours, strict=True)
        for sample in (query + 100, *(found + 100))
    ]
    assert asked == expected
    [axes] = figure.axes
    colours = [matplotlib.colors.to_hex(frame.get_edgecolor()) for frame in axes.patches]
    assert len(colours) == len(axes.images) == len(expected)
    for row, hits in enumerate(rows.hits):
        frames = [HIT_COLOUR if hit else MISS_COLOUR for hit in hits]
        assert colours[3 * row + 1 : 3 * row + 3] == frames
    captions = " ".join(text.get_text() for text in axes.texts)
    assert captions.isascii()
    figure.savefig(picture := io.BytesIO(), format="png")
    assert picture.getvalue().startswith(b"\x89PNG")


def test_a_gallery_without_answers_is_refused():
    samples = on_a_line()
    alone = samples.rows(np.array([0, 2, 4]))
    with pytest.raises(UsageError, match="nothing to show"):
        retrieval_gallery(alone, None, L2, lambda _: np.zeros((2, 2), np.uint8))


def test_a_separate_gallery_with_fewer_items_than_columns_is_drawn():
    samples = on_a_line()
    searched = samples.rows(np.array([1, 3, 11]))
    queries = samples.rows(np.array([0, 2, 10]))
    figure = retrieval_gallery(queries, searched, L2, lambda _: np.zeros((2, 2), np.uint8))
    assert len(figure.axes[0].images) == 3 * (1 + 3)


def test_images_keep_their_shape_in_the_gallery():
    figure = retrieval_gallery(on_a_line(), None, L2, lambda _: np.zeros((4, 8), np.uint8))
    for image, frame in zip(figure.axes[0].images, figure.axes[0].patches, strict=True):
        left, right, bottom, top = image.get_extent()
        assert (right - left) / (top - bottom) == pytest.approx(2)
        assert (frame.get_width(), frame.get_height()) == pytest.approx((0.8, 0.4))


def test_the_curve_holds_every_point():
    rows = {"pixels": {8: 0.4, 1: 0.1}, "a $ trained $": {1: 0.7, 2: 0.8, 4: 0.9}}
    figure = recall_curve(rows, "Unseen")
    lines = figure.axes[0].get_lines()
    assert [np.asarray(line.get_xdata()).tolist() for line in lines] == [[1, 8], [1, 2, 4]]
    assert [np.asarray(line.get_ydata()).tolist() for line in lines] == [
        [0.1, 0.4],
        [0.7, 0.8, 0.9],
    ]
    figure.savefig(io.BytesIO(), format="png")


def test_the_table_is_aligned_and_marks_what_is_missing():
    rows = {
        "pixels": {"recall_at_10": 0.5, "recall_at_2": 0.25, "precision_at_1": 1.0, "nmi": 0.125},
        "trained": {"recall_at_2": 1.0, "map_at_r": 0.33333, "num_queries": 10.0},
    }
    assert score_table(rows).splitlines() == [
        "         Recall@2  Recall@10   MAP@R     NMI",
        "--------------------------------------------",
        "pixels     0.2500     0.5000       -  0.1250",
        "trained    1.0000          -  0.3333       -",
    ]
