"""Indexes that are kept: what they find, what is said of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from dist_dml.errors import UsageError
from dist_dml.retrieval import search_files
from dist_dml.retrieval.distances import named_distance
from dist_dml.retrieval.embeddings import Embeddings
from dist_dml.retrieval.neighbours import NO_NEIGHBOUR
from dist_dml.retrieval.search_files import (
    SearchFacts,
    open_search_index,
    relative_path,
    write_index,
)
from dist_dml.retrieval.search_index import (
    IndexOptions,
    SearchIndex,
    build_index,
    fitted,
    measure,
)
from dist_dml.retrieval.search_threshold import best_cut, neighbour_threshold

DISTANCES = ("cosine", "l2")
KINDS = ("flat", "hnsw", "ivf_pq")


def clustered(seed: int, count: int = 900, width: int = 16, classes: int = 90) -> Embeddings:
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((classes, width))
    labels = np.arange(count) % classes
    vectors = centres[labels] + 0.4 * draw.standard_normal((count, width))
    return Embeddings(vectors.astype(np.float32), labels, draw.permutation(count) + 7)


def dense_nearness(name: str, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Larger is nearer, in float64, without FAISS."""
    x, y = queries.astype(np.float64), gallery.astype(np.float64)
    if name == "l2":
        return -np.square(x[:, None] - y[None]).sum(axis=2)
    return (x / np.linalg.norm(x, axis=1)[:, None]) @ (y / np.linalg.norm(y, axis=1)[:, None]).T


@pytest.mark.parametrize("name", DISTANCES)
def test_a_flat_index_finds_what_sorting_all_distances_finds(name: str) -> None:
    gallery, queries = clustered(0), clustered(1, 20)
    index = build_index(gallery.vectors, named_distance(name), IndexOptions())
    positions, values = index.search(queries.vectors, 15)
    near = dense_nearness(name, queries.vectors, gallery.vectors)
    np.testing.assert_array_equal(positions, np.argsort(-near, axis=1, kind="stable")[:, :15])
    expected = np.take_along_axis(near, positions, axis=1)
    np.testing.assert_allclose(values if name == "cosine" else -values, expected, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DISTANCES)
def test_the_recall_that_is_stated_is_that_of_a_brute_force_twin(kind: Any, name: str) -> None:
    gallery = clustered(2)
    options = IndexOptions(kind, links=4, build_effort=8, search_effort=2, lists=20, probes=1)
    index = build_index(gallery.vectors, named_distance(name), options)
    queries = gallery.rows(np.arange(0, 900, 9))
    measured = measure(index, queries, gallery)
    near = dense_nearness(name, queries.vectors, gallery.vectors)
    own = np.arange(0, 900, 9)
    near[np.arange(100), own] = -np.inf
    exact = np.argsort(-near, axis=1, kind="stable")
    positions, _ = index.search(queries.vectors, 11)
    for at in (1, 10):
        shares = []
        for row in range(100):
            others = [p for p in positions[row].tolist() if p not in (own[row], NO_NEIGHBOUR)]
            shares.append(len(set(others[:at]) & set(exact[row, :at].tolist())) / at)
        assert measured.recall[at] == pytest.approx(np.mean(shares))
    assert measured.num_queries == 100
    assert measured.milliseconds > 0
    if kind == "flat":
        assert measured.recall == {1: 1.0, 10: 1.0}
    else:  # So badly made that the measurement has something to tell.
        assert measured.recall[10] < 0.95


def test_an_index_of_other_vectors_has_no_recall() -> None:
    gallery = clustered(3)
    other = gallery.vectors[np.random.default_rng(0).permutation(900)]
    index = build_index(other, named_distance("cosine"), IndexOptions())
    assert measure(index, gallery.rows(slice(0, 200)), gallery).recall[10] < 0.1


@pytest.mark.parametrize("name", DISTANCES)
def test_of_items_at_the_same_distance_any_counts(name: str) -> None:
    gallery = clustered(4, 60)
    vectors = np.repeat(gallery.vectors, 30, axis=0)
    every = Embeddings(vectors, np.repeat(gallery.labels, 30), np.arange(1800))
    index = build_index(vectors, named_distance(name), IndexOptions())
    assert measure(index, every.rows(slice(0, None, 7)), every).recall == {1: 1.0, 10: 1.0}


@pytest.mark.parametrize("kind", ["hnsw", "ivf_pq"])
@pytest.mark.parametrize("name", DISTANCES)
def test_with_its_own_parameters_an_approximate_index_finds_most(kind: Any, name: str) -> None:
    gallery = clustered(5, 1500, 16)
    index = build_index(gallery.vectors, named_distance(name), IndexOptions(kind))
    recall = measure(index, gallery.rows(slice(0, None, 20)), gallery).recall
    assert recall[10] > (0.99 if kind == "hnsw" else 0.5)


def test_without_other_items_nothing_is_claimed() -> None:
    alone = clustered(6, 1)
    index = build_index(alone.vectors, named_distance("l2"), IndexOptions())
    assert measure(index, alone, alone).recall == {}


def test_equal_items_are_in_the_order_of_the_gallery() -> None:
    vectors = np.repeat(clustered(7, 3).vectors, 4, axis=0)
    index = build_index(vectors, named_distance("cosine"), IndexOptions())
    positions, _ = index.search(vectors[4:5], 4)
    assert positions.tolist() == [[4, 5, 6, 7]]


@pytest.mark.parametrize("kind", KINDS)
def test_more_neighbours_than_items_gives_all_items_once(kind: Any) -> None:
    gallery = clustered(8, 700)
    options = IndexOptions(kind, probes=17)  # All lists.
    index = build_index(gallery.vectors, named_distance("l2"), options)
    positions, values = index.search(gallery.vectors[:3], 1000)
    assert positions.shape == (3, 700)
    for row in positions:
        found = row[row != NO_NEIGHBOUR]
        assert len(set(found.tolist())) == len(found)
        if kind != "hnsw":  # A graph may leave some unreached.
            assert len(found) == 700
    assert (np.diff(values, axis=1) >= 0).all()


def test_what_no_index_can_answer_is_refused() -> None:
    index = build_index(clustered(9).vectors, named_distance("cosine"), IndexOptions())
    with pytest.raises(UsageError, match="queries are 15 wide and the index 16"):
        index.search(np.zeros((1, 15), np.float32), 3)
    with pytest.raises(UsageError, match="k=0 neighbours"):
        index.search(np.zeros((1, 16), np.float32), 0)
    with pytest.raises(UsageError, match="not finite"):
        index.search(np.full((1, 16), np.nan, np.float32), 3)


@pytest.mark.parametrize(
    ("options", "count", "says"),
    [
        (IndexOptions("ivf_pq"), 623, "needs at least 624 vectors .* has 623"),
        (IndexOptions("ivf_pq", code_parts=5), 900, "--code-parts=5 does not divide the width 16"),
        (IndexOptions("ivf_pq", lists=24), 900, "--lists=24 is outside 1..23"),
        (IndexOptions("ivf_pq", lists=-1), 900, "--lists=-1 is outside"),
        (IndexOptions("ivf_pq", probes=-3), 900, "--probes=-3 must be"),
        (IndexOptions("hnsw", links=1), 900, "--links=1 must be at least 2"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(options, count, says) -> None:
    with pytest.raises(UsageError, match=says):
        fitted(options, count, 16)


def test_an_empty_gallery_and_a_distance_of_probabilities_are_refused() -> None:
    with pytest.raises(UsageError, match="the gallery is empty"):
        build_index(np.zeros((0, 4), np.float32), named_distance("l2"), IndexOptions())
    with pytest.raises(UsageError, match="searches by cosine or l2"):
        build_index(clustered(0).vectors, named_distance("metric(p=0.5)"), IndexOptions())


def test_parts_of_a_code_divide_any_width() -> None:
    for width, parts in ((128, 32), (96, 24), (97, 97), (6, 2), (1, 1)):
        assert fitted(IndexOptions("ivf_pq"), 10_000, width).code_parts == parts


def stored(folder: Path, kind: Any = "flat", texts: bool = False) -> Embeddings:
    """An index folder of 700 items. Returns them."""
    gallery = clustered(10, 700)
    index = build_index(gallery.vectors, named_distance("cosine"), IndexOptions(kind))
    ids = gallery.ids.tolist()
    table = pyarrow.table(
        {
            "id": [f"key/{one}" for one in ids] if texts else ids,
            "label": [f"c{label}" for label in gallery.labels],
            "image_row": pyarrow.array([-1] * 700, pyarrow.int64()),
            "metadata.size": [float("nan") if i == 1 else float(i) for i in range(700)],
        }
    )
    write_index(folder, index, table, facts_of(index))
    return gallery


def facts_of(index: SearchIndex) -> SearchFacts:
    return SearchFacts(
        kind=index.options.kind, distance="cosine", width=16, count=700, rows="images",
        options=vars(index.options), recall={"1": 1.0}, num_measured=5, measured_on="rows",
        milliseconds=0.1, exact_milliseconds=0.2, files={},
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_is_read_back_answers_as_before(tmp_path: Path, kind: Any) -> None:
    gallery = stored(tmp_path / "index", kind)
    built = build_index(gallery.vectors, named_distance("cosine"), IndexOptions(kind))
    opened = open_search_index(tmp_path / "index")
    for before, after in zip(
        built.search(gallery.vectors[:50], 9),
        opened.index.search(gallery.vectors[:50], 9),
        strict=True,
    ):
        np.testing.assert_array_equal(before, after)
    assert opened.index.options == built.options
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index"]
    assert opened.item(1)["metadata"] == {"size": "nan"}
    assert opened.item(2) == {"id": int(gallery.ids[2]), "label": "c2", "metadata": {"size": 2.0}}


@pytest.mark.parametrize("texts", [False, True])
def test_items_are_found_by_the_id_that_was_written(tmp_path: Path, texts: bool) -> None:
    gallery = stored(tmp_path / "index", texts=texts)
    opened = open_search_index(tmp_path / "index")
    for row in (0, 3, 699):
        text = f"key/{gallery.ids[row]}" if texts else str(gallery.ids[row])
        assert opened.position_of(text) == row
    for text in ("", "-1", "9" * 19, "9" * 40, "7.0", "²", "key/none", "../x", "--5"):
        assert opened.position_of(text) is None


def changed_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["index.faiss", "gallery.parquet"])
@pytest.mark.parametrize("damage", ["byte", "end", "gone", "link"])
def test_a_file_that_is_not_as_it_was_written_is_refused(tmp_path, name, damage) -> None:
    folder = tmp_path / "index"
    stored(folder)
    path = folder / name
    if damage == "byte":
        changed_byte(path)
    elif damage == "end":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "gone":
        path.unlink()
    else:
        path.rename(tmp_path / name)
        path.symlink_to(tmp_path / name)
    reasons = {"byte": "checksum", "end": "bytes, not", "gone": "missing", "link": "no regular"}
    with pytest.raises(UsageError, match=f"unreadable .*{name}.*{reasons[damage]}.*build it again"):
        open_search_index(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"count": 699}, "700 x 16 numbers, expected 699 x 16"),
        ({"width": 8}, "700 x 16 numbers, expected 700 x 8"),
        ({"count": -1}, "count"),
        ({"kind": "hnsw"}, "options are not those of hnsw"),
        ({"distance": "metric"}, "distance"),
        ({"format_version": 2}, "format_version"),
        ({"threshold": "0.5"}, "threshold"),
        ({"options": {"kind": "flat", "depth": 1}}, "options are not those of flat"),
        ({"options": {"kind": "flat", "links": "3"}}, "options are not whole numbers"),
        ({"files": {}}, "does not describe index.faiss"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change, says) -> None:
    stored(tmp_path / "index")
    path = tmp_path / "index" / "search.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=says):
        open_search_index(tmp_path / "index")


def test_files_of_two_indexes_do_not_fit_together(tmp_path: Path) -> None:
    """With checksums that are right: the kind, the rows and the columns are looked at too."""
    stored(tmp_path / "flat")
    stored(tmp_path / "graph", "hnsw")
    flat, graph = (tmp_path / name / "search.json" for name in ("flat", "graph"))
    facts = json.loads(flat.read_text())
    facts["files"]["index.faiss"] = json.loads(graph.read_text())["files"]["index.faiss"]
    flat.write_text(json.dumps(facts))
    (tmp_path / "flat" / "index.faiss").write_bytes(
        (tmp_path / "graph" / "index.faiss").read_bytes()
    )
    with pytest.raises(UsageError, match="holds a IndexHNSWFlat, expected flat"):
        open_search_index(tmp_path / "flat")


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not an index"):
        open_search_index(tmp_path)


def test_nothing_is_written_over_and_nothing_half_written_stays(tmp_path, monkeypatch) -> None:
    stored(tmp_path / "index")
    with pytest.raises(UsageError, match="is there already"):
        stored(tmp_path / "index")

    def fail(*words: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(search_files, "write_parquet", fail)
    with pytest.raises(OSError, match="No space left"):
        stored(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_an_index_and_what_it_names_may_be_moved_together(tmp_path: Path) -> None:
    (tmp_path / "a" / "runs").mkdir(parents=True)
    stored(tmp_path / "a" / "index")
    text = relative_path(tmp_path / "a" / "runs", tmp_path / "a" / "index")
    (tmp_path / "a").rename(tmp_path / "b")
    opened = open_search_index(tmp_path / "b" / "index")
    assert Path(opened.place(text)).resolve() == tmp_path / "b" / "runs"
    assert opened.place("${SECRET}/data") == relative_path("${SECRET}/data", tmp_path)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_has_the_best_balanced_accuracy_of_all(name: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    same = draw.random(80) < 0.4
    near = np.round(draw.normal(0, 1, 80) + same, 1)  # Rounded: many are equal.
    distance = named_distance(name)
    cut = best_cut(near, same, distance)
    assert cut is not None
    cut = cut if name == "cosine" else -cut

    def gain(threshold: float) -> float:
        accepted = near >= threshold
        return accepted[same].mean() - accepted[~same].mean()

    assert gain(cut) == pytest.approx(max(gain(threshold) for threshold in near))
    assert not (near == cut).any()


def test_no_threshold_where_classes_cannot_be_told_apart() -> None:
    cosine = named_distance("cosine")
    assert best_cut(np.array([0.9, 0.8]), np.array([True, True]), cosine) is None
    assert best_cut(np.array([0.9, 0.8]), np.array([False, False]), cosine) is None
    assert best_cut(np.array([0.5, 0.5]), np.array([True, False]), cosine) is None
    assert best_cut(np.array([0.9, 0.1]), np.array([False, True]), cosine) is None


@pytest.mark.parametrize("name", DISTANCES)
def test_the_threshold_parts_clusters(name: str) -> None:
    draw = np.random.default_rng(0)
    vectors = np.repeat(10 * np.eye(8), 4, axis=0) + 0.1 * draw.standard_normal((32, 8))
    gallery = Embeddings(vectors.astype(np.float32), np.arange(32) // 4, np.arange(32))
    cut = neighbour_threshold(gallery, gallery, named_distance(name))
    near = dense_nearness(name, gallery.vectors, gallery.vectors)
    same = gallery.labels[:, None] == gallery.labels
    assert cut is not None
    assert ((near >= (cut if name == "cosine" else -cut)) == same).all()
