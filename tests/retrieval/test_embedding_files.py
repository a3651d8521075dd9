"""Embeddings as Parquet: what is written comes back, and what cannot be measured is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_dml.errors import UsageError
from dist_dml.retrieval import embedding_columns
from dist_dml.retrieval.embedding_columns import ColumnNames
from dist_dml.retrieval.embedding_files import read_embeddings, read_pair, write_embeddings


def rows(n: int = 10, width: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def written(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", [int, str])
def test_what_is_written_is_read(tmp_path: Path, dtype: Any, kind: type) -> None:
    vectors = rows()
    ids = [kind(3 * i + 100) for i in range(10)]
    labels = [kind(7 - i % 3) for i in range(10)]
    split = ["test"] * 9 + [None]
    path = tmp_path / "a.parquet"
    write_embeddings(path, ids, labels, vectors, {"split": split}, dtype, {"made by": "hand"})
    table = read_embeddings(path)
    assert (table.embeddings.vectors == vectors.astype(dtype).astype(np.float32)).all()
    assert table.id_values == ids
    assert [table.label_of(row) for row in range(10)] == labels
    assert table.label_values == sorted(set(labels))
    assert table.metadata == {"split": split}
    assert table.facts == {"made by": "hand"}
    assert table.has_ids
    if kind is int:
        assert table.embeddings.ids.tolist() == ids


@pytest.mark.parametrize("number", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda t: pa.list_(t, 4)])
def test_lists_of_every_kind_and_precision_are_the_same_embeddings(
    tmp_path: Path, number: Any, kind: Any
) -> None:
    vectors = rows().astype(np.float16)
    lists = pa.array(vectors.tolist(), kind(number))
    table = pa.table({"label": [1] * 10, "embedding": lists})
    # Small row groups and pages: batches begin in the middle of either.
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, data_page_size=16)
    found = read_embeddings(tmp_path / "a.parquet")
    assert (found.embeddings.vectors == vectors).all()
    assert found.embeddings.vectors.dtype == np.float32
    assert not found.has_ids
    assert found.id_values == list(range(10))


def test_files_of_many_batches_come_in_their_order(tmp_path: Path) -> None:
    vectors = rows(40_000, 2)
    ids = np.random.default_rng(1).permutation(40_000)
    write_embeddings(tmp_path / "a.parquet", ids, ids % 7, vectors)
    found = read_embeddings(tmp_path / "a.parquet")
    assert (found.embeddings.vectors == vectors).all()
    assert (found.embeddings.ids == ids).all()
    assert (found.embeddings.labels == ids % 7).all()


def test_a_large_row_group_is_read_in_little_more_memory_than_its_embeddings(
    tmp_path: Path,
) -> None:
    n, width = 100_000, 32
    write_embeddings(tmp_path / "a.parquet", np.arange(n), np.arange(n) % 9, rows(n, width))
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    pool = pa.default_memory_pool()
    largest, before = 0, pool.bytes_allocated()

    def look(*_: object) -> None:
        nonlocal largest
        largest = max(largest, pool.bytes_allocated() - before)

    fill = embedding_columns._fill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_columns, "_BATCH_ROWS", 1024)
        patch.setattr(embedding_columns, "_fill", lambda *given: (look(), fill(*given)))
        table = read_embeddings(tmp_path / "a.parquet")
    # The embeddings themselves, 12 MiB here and in the file, are numpy's.
    assert 2**17 < largest < 8 * 2**20
    assert len(table) == n


def test_a_folder_is_its_parts_in_the_order_of_their_names(tmp_path: Path) -> None:
    vectors = rows(9)
    for part, at in enumerate((0, 3, 3, 6)):  # One has no rows.
        stop = 3 * (part + 1) if part < 1 else 3 * part
        write_embeddings(
            tmp_path / f"{part}.parquet",
            np.arange(at, stop),
            pa.array([f"c{i % 2}" for i in range(at, stop)], pa.string()),
            vectors[at:stop],
            {"split": pa.array([f"part {part}"] * (stop - at), pa.string())},
        )
    (tmp_path / "_hidden.parquet").write_bytes(b"of another program")
    found = read_embeddings(tmp_path)
    assert (found.embeddings.vectors == vectors).all()
    assert found.id_values == list(range(9))
    assert found.metadata["split"] == ["part 0"] * 3 + ["part 2"] * 3 + ["part 3"] * 3
    assert read_embeddings(tmp_path, metadata=[]).metadata == {}


def test_columns_of_other_names_and_types_are_taken_as_told(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.parquet",
        vec=rows(3).tolist(),
        person=pa.array(["b", "a", "b"]).dictionary_encode(),
        file=["x", "y", "z"],
        camera=pa.array(["left", None, "left"]).dictionary_encode(),
        pixels=[[1], [2], [3]],
        label=["not", "the", "label"],
    )
    found = read_embeddings(path, ColumnNames("vec", "person", "file"))
    assert found.id_values == ["x", "y", "z"]
    assert found.embeddings.labels.tolist() == [1, 0, 1]
    assert found.metadata["camera"] == ["left", None, "left"]
    # Lists are no metadata: they may be the images.
    assert set(found.metadata) == {"camera", "label"}


GOOD = {"label": [1, 2], "embedding": [[1.0, 2.0], [3.0, 4.0]]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": None}, r"no column 'label'; it has: 'embedding'.*--label-column"),
        ({"embedding": None}, r"no column 'embedding'; it has: 'label'.*--embedding-column"),
        ({"label": [1, None]}, r"column 'label' is null in row 1"),
        ({"id": ["a", None]}, r"column 'id' is null in row 1"),
        ({"label": [1.0, 2.0]}, r"'label' is of double, expected integers or strings"),
        ({"label": [True, False]}, r"'label' is of bool"),
        ({"label": [1, -1]}, r"row 1 has label -1, expected 0 or more"),
        ({"id": [1.5, 2.5]}, r"'id' is of double"),
        ({"id": [4, 4]}, r"id 4 is in rows 0 and 1"),
        ({"id": ["k", "k"]}, r"id 'k' is in rows 0 and 1"),
        ({"id": pa.array([1, 2**63], pa.uint64())}, r"'id' holds 2\^63 or more"),
        ({"embedding": [1.0, 2.0]}, r"'embedding' is of double, expected lists"),
        ({"embedding": [[1], [2]]}, r"is of list<element: int64>, expected lists of float16"),
        ({"embedding": [[], []]}, r"is of list|empty embedding"),
        ({"embedding": [[1.0], [1.0, 2.0]]}, r"row 1 has 2 numbers and those before it 1"),
        ({"embedding": [[1.0, 2.0], None]}, r"embedding of row 1 is null"),
        ({"embedding": [[1.0, 2.0], [None, 1.0]]}, r"embedding of row 1 holds a null"),
        (
            {"embedding": pa.array([[1.0], None], pa.list_(pa.float32(), 1))},
            r"an embedding is null",
        ),
        ({"embedding": [[1.0, 2.0], [3.0, np.nan]]}, r"row 1 holds nan at place 1"),
        ({"embedding": [[-np.inf, 2.0], [3.0, 4.0]]}, r"row 0 holds -inf at place 0"),
        ({"embedding": [[1.0, 2.0], [1e300, 4.0]]}, r"row 1 holds inf at place 0"),
    ],
)
def test_what_is_no_embedding_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    columns = {name: value for name, value in (GOOD | change).items() if value is not None}
    path = written(tmp_path / "a.parquet", **columns)
    with pytest.raises(UsageError, match=words) as refusal:
        read_embeddings(path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_the_file_that_all_refusals_change_is_read(tmp_path: Path) -> None:
    assert len(read_embeddings(written(tmp_path / "a.parquet", **GOOD))) == 2


def test_what_is_no_file_of_embeddings_is_refused(tmp_path: Path) -> None:
    for path, content, words in (
        (tmp_path / "none", None, "no such file or folder"),
        (tmp_path / "text", b"hello", "is it a whole Parquet file"),
        (tmp_path, None, r"holds no \*.parquet files"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError, match=words):
            read_embeddings(path)
    write_embeddings(tmp_path / "e.parquet", np.arange(0), np.arange(0), rows(0))
    with pytest.raises(UsageError, match="has no rows"):
        read_embeddings(tmp_path / "e.parquet")
    with pytest.raises(UsageError, match="no column 'key'"):
        read_embeddings(tmp_path / "e.parquet", ColumnNames(id="key"))


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_embeddings(path, np.arange(500), np.arange(500), rows(500, 16))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot read a\.parquet"):
        read_embeddings(path)


def test_parts_that_differ_are_refused_with_the_difference(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "0.parquet", [1], [1], rows(1, 4))
    write_embeddings(tmp_path / "1.parquet", [2], [1], rows(1, 5))
    with pytest.raises(UsageError, match=r"differ in width: 4 and 5"):
        read_embeddings(tmp_path)
    write_embeddings(tmp_path / "1.parquet", [1], [1], rows(1, 4))
    with pytest.raises(UsageError, match=r"id 1 is in rows 0 and 1"):
        read_embeddings(tmp_path)


def test_float16_refuses_numbers_beyond_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="70000, and float16 ends at 65504"):
        write_embeddings(
            tmp_path / "a.parquet", [1], [1], np.array([[7e4]], np.float32), dtype="float16"
        )
    assert not list(tmp_path.iterdir())


def test_a_pair_is_numbered_together(tmp_path: Path) -> None:
    q, g = tmp_path / "q.parquet", tmp_path / "g.parquet"
    write_embeddings(q, ["a", "b"], ["dog", "cat"], rows(2))
    write_embeddings(g, ["c", "b", "d"], ["ant", "cat", "dog"], rows(3))
    queries, gallery = read_pair(q, g)
    assert gallery is not None
    assert queries.label_values == gallery.label_values == ["ant", "cat", "dog"]
    assert queries.embeddings.labels.tolist() == [2, 1]
    assert gallery.embeddings.labels.tolist() == [0, 1, 2]
    assert queries.embeddings.ids[1] == gallery.embeddings.ids[1]
    assert len({*queries.embeddings.ids.tolist(), *gallery.embeddings.ids.tolist()}) == 4
    alone, none = read_pair(q, None)
    assert none is None
    assert alone.label_values == ["cat", "dog"]


def test_without_ids_no_sample_is_in_both(tmp_path: Path) -> None:
    q = written(tmp_path / "q.parquet", **GOOD)
    g = written(tmp_path / "g.parquet", id=[0, 1], **GOOD)
    queries, gallery = read_pair(q, g)
    assert gallery is not None
    assert not set(queries.embeddings.ids.tolist()) & set(gallery.embeddings.ids.tolist())
    assert gallery.id_values == [0, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embedding": [[1.0], [2.0]]}, r"width 2 and .* of 1"),
        ({"label": ["1", "2"]}, r"labels are ints in .* and strings in"),
        ({"id": ["7", "8"]}, r"ids are ints in .* and strings in"),
        ({"label": [1, 5]}, r"id 8 has label 2 in .* and 5 in"),
        ({"id": [9, 9]}, r"id 9 is in rows 0 and 1"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    q = written(tmp_path / "q.parquet", **(GOOD | {"id": [7, 8]}))
    g = written(tmp_path / "g.parquet", **(GOOD | {"id": [7, 8]} | change))
    with pytest.raises(UsageError, match=words):
        read_pair(q, g)


def test_one_file_as_both_is_refused(tmp_path: Path) -> None:
    q = written(tmp_path / "q.parquet", **GOOD)
    with pytest.raises(UsageError, match="as queries and as gallery"):
        read_pair(q, tmp_path / "." / "q.parquet")


def test_numbers_of_different_data_sets_are_not_compared_and_names_are(tmp_path: Path) -> None:
    q, g = tmp_path / "q.parquet", tmp_path / "g.parquet"
    for path, data in ((q, "a"), (g, "b")):
        names = {"class_name": [f"dog {data}", "cat"], "key": [f"{data}0", f"{data}1"]}
        write_embeddings(path, [0, 1], [0, 1], rows(2), names, facts={"fingerprint": data})
    with pytest.raises(UsageError, match=r"different data, .*--label-column class_name"):
        read_pair(q, g)
    queries, gallery = read_pair(q, g, ColumnNames(label="class_name", id="key"))
    assert gallery is not None
    assert queries.embeddings.labels.tolist() == [1, 0]
    assert gallery.embeddings.labels.tolist() == [2, 0]
    assert not set(queries.embeddings.ids.tolist()) & set(gallery.embeddings.ids.tolist())


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_shares_are_the_rows_of_the_whole_with_the_same_numbers(
    workers: int, tmp_path: Path
) -> None:
    """Groups of 8 rows: most shares begin and end within one."""
    draw = np.random.default_rng(1)
    for name, rows in (("a", 37), ("b", 0), ("c", 22)):
        table = {
            "id": pa.array([f"{name}{i}" for i in range(rows)], pa.string()),
            "label": pa.array([f"l{i % 5}" for i in range(rows)], pa.string()),
            "embedding": pa.array(list(draw.normal(size=(rows, 3))), pa.list_(pa.float64())),
            "place": pa.array(range(rows), pa.int64()),
        }
        (tmp_path / "q").mkdir(exist_ok=True)
        pq.write_table(pa.table(table), tmp_path / "q" / f"{name}.parquet", row_group_size=8)
    gallery = tmp_path / "g.parquet"
    vectors = draw.normal(size=(5, 3)).astype(np.float32)
    write_embeddings(gallery, [*"vwxyz"], ["l9", "l1", "l0", "l1", "l3"], vectors)
    whole = read_pair(tmp_path / "q", gallery)
    shares = [read_pair(tmp_path / "q", gallery, share=(rank, workers)) for rank in range(workers)]
    for which in (0, 1):
        every = whole[which]
        assert every is not None
        parts = [share[which] for share in shares]
        for name in ("vectors", "labels", "ids"):
            joined = np.concatenate([getattr(part.embeddings, name) for part in parts if part])
            assert np.array_equal(joined, getattr(every.embeddings, name)), name
        for rank, part in enumerate(parts):
            assert part is not None
            assert len(part) == len(every)
            assert part.metadata == every.metadata
            assert np.array_equal(part.ids, every.ids)
            assert np.array_equal(part.labels, every.labels)
            for table in (part, every):
                own = table.share(rank, workers)
                assert np.array_equal(own.vectors, part.embeddings.vectors)
    with pytest.raises(UsageError, match="2 models side by side are brought in order by one pro"):
        read_pair([tmp_path / "q", tmp_path / "q"], None, share=(0, 2))


def test_groups_of_rows_that_are_not_as_the_footer_says_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    write_embeddings(path, range(8), range(8), np.ones((8, 2), np.float32))
    plain = embedding_columns._batches

    def shifted(file: Any, embedding: str, columns: Any, wanted: slice) -> Any:
        return plain(file, embedding, columns, slice(8, 8))

    monkeypatch.setattr(embedding_columns, "_batches", shifted)
    with pytest.raises(UsageError, match="other groups of rows than its footer"):
        read_embeddings(path)
