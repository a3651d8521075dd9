"""Indexes that say what cannot be: each once came out as a traceback, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from dist_dml.cli import main
from dist_dml.data.index import load_index
from dist_dml.data.index_command import build_index
from dist_dml.errors import UsageError


@pytest.fixture
def folder(shard_folder: Path, tmp_path: Path) -> Path:
    """A data set of its own: four shards, 48 samples, 10 classes of which 5 are trained."""
    copy = tmp_path / "data"
    copy.mkdir()
    for path in shard_folder.glob("*.tar"):
        shutil.copy2(path, copy)
    build_index(copy)
    return copy


def refusal(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_index(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"data.path={folder}: ")
    assert message.endswith(f"run `dist-dml index {folder}`")
    return message


def edit(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    parquet.write_table(change(parquet.read_table(folder / name)), folder / name)


def with_value(name: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        column = table[name].to_pylist()
        column[row] = value
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, pa.array(column, table[name].type))

    return change


def with_type(name: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, table[name].cast(kind))

    return change


# What is done to the index, and what the line says.
COLUMNS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "no class_id": (
        lambda table: table.drop_columns(["class_id"]),
        "has the column class_id 0 tim",
    ),
    "class_id twice": (
        lambda table: table.append_column("class_id", table["class_id"]),
        "has the column class_id 2 times",
    ),
    "offsets in 32 bits": (with_type("offset", pa.int32()), "offset is of int32, expected int64"),
    "sizes as text": (with_type("size", pa.string()), "size is of string, expected int64"),
    "keys as bytes": (with_type("key", pa.binary()), "key is of binary, expected string"),
    "a class without a value": (with_value("class_id", 3, None), "class_id has rows without a val"),
    "a negative class": (
        with_value("class_id", 3, -1),
        r"class_id of a sample of shard .* is -1, ",
    ),
    "a class too many": (with_value("class_id", 3, 10), r"class_id .* is 10, expected 0\.\.9"),
    "a split too many": (with_value("split", 3, 3), r"split .* is 3, expected 0\.\.2"),
    "an extension too many": (with_value("extension", 3, 4), r"extension .* is 4, expected 0\.\.3"),
    "another shard": (with_value("shard", 3, 1), r"shard .* is 1, expected 0\.\.0"),
    "a negative offset": (with_value("offset", 3, -512), r"offset .* is -512, "),
    "an offset beyond the shard": (with_value("offset", 3, 2**40), r"offset .* is 1099511627776, "),
    "a negative size": (with_value("size", 3, -1), r"size .* is -1, "),
    "an endless size": (with_value("size", 3, 2**62), r"size .* is 4611686018427387904,"),
    "an image to the end and more": (with_value("size", 5, 20_000), "overlap or reach beyond"),
    "an image twice": (with_value("offset", 3, 512), "overlap or reach beyond its end"),
    "fewer rows": (lambda table: table.slice(1), "it has 47 rows, dataset.json says 48"),
    "more rows": (lambda table: pa.concat_tables([table] * 2), "96 rows, dataset.json says 48"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_say_what_cannot_be_are_refused(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = COLUMNS[case]
    edit(folder, "index.parquet", change)
    with pytest.raises(UsageError, match=expected):
        load_index(folder)
    assert "index.parquet" in refusal(folder)
    # The command that looks at images reads the same index, without a look at the tars.
    assert main(["verify", "--processes", "1", str(folder)]) == 2
    assert "index.parquet" in capsys.readouterr().err.splitlines()[-1]


def set_in(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


METADATA: dict[str, tuple[Callable[[Any], object], str]] = {
    "a shard as text": (set_in("shards", 0, value="a.tar"), r"shards\.0.*valid dictionary"),
    "no bytes": (lambda tree: tree["shards"][0].pop("bytes"), r"shards\.0\.bytes.*required"),
    "samples as text": (set_in("shards", 0, "samples", value="11"), r"shards\.0\.samples.*integer"),
    "negative samples": (set_in("shards", 0, "samples", value=-1), r"shards\.0\.samples.*greater"),
    "a time as text": (set_in("shards", 0, "modified", value="now"), r"modified.*integer"),
    "a name of two lines": (set_in("shards", 0, "name", value="a\nb"), r"shards\.0\.name.*pattern"),
    "a name with a zero byte": (set_in("shards", 0, "name", value="a\0b"), r"name.*pattern"),
    "more samples than bytes": (set_in("shards", 0, "bytes", value=3000), r"6 samples in 3000 byt"),
    "other counts": (set_in("num_samples", value=47), r"shards add up to 48, num_samples=47"),
    "other splits": (set_in("split_names", 0, value="x"), r"samples_per_split and split_names dif"),
    "a split twice": (set_in("split_names", 0, value="train"), r"split_names has a name twice"),
    "classes beyond all": (
        set_in("num_classes", value=11),
        r"num_classes=11 of num_classes_all=10",
    ),
    "classes as text": (set_in("num_classes", value="5"), r"num_classes.*valid integer"),
    "a list": (set_in("split_names", value={}), r"split_names.*valid list"),
    "a format that is true": (set_in("format_version", value=True), r"format_version is missing"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_say_what_cannot_be_are_refused(case: str, folder: Path) -> None:
    change, expected = METADATA[case]
    tree = json.loads((folder / "dataset.json").read_text())
    change(tree)
    (folder / "dataset.json").write_text(json.dumps(tree))
    with pytest.raises(UsageError, match=expected):
        load_index(folder)
    assert "dataset.json is damaged (" in refusal(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", '{"a": 1, "a": 2}', "NaN", "\xff"])
def test_metadata_that_are_no_json_object_are_refused(text: str, folder: Path) -> None:
    (folder / "dataset.json").write_bytes(text.encode("latin-1"))
    assert "dataset.json is damaged (" in refusal(folder)


def test_a_class_too_many_in_the_metadata_is_noticed_by_the_catalogue(folder: Path) -> None:
    tree = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**tree, "num_classes_all": 10**12}))
    assert "classes.parquet (it has 10 rows, dataset.json says 1000000000000)" in refusal(folder)
    (folder / "classes.parquet").unlink()
    assert "cannot read classes.parquet" in refusal(folder)


@pytest.mark.parametrize("name", ["class_id", "offset", "checksum"])
def test_a_flipped_bit_in_a_column_is_noticed(name: str, folder: Path) -> None:
    path = folder / "index.parquet"
    group = parquet.ParquetFile(path).metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    chunk = next(column for column in columns if column.path_in_schema == name)
    # The last byte of the pages: a value, or the code of one.
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    assert "CRC checksum" in refusal(folder)


def texts_with(table: pa.Table, name: str) -> pa.Table:
    """The last text is not UTF-8 any more, which pyarrow writes and reads without a word."""
    texts = [text.encode() for text in table[name].to_pylist()]
    column = pa.array([*texts[:-1], b"\xff\xfe"], pa.binary()).view(pa.string())
    return table.set_column(table.schema.get_field_index(name), name, column)


def test_keys_and_names_that_are_no_text_are_refused_where_they_are_read(folder: Path) -> None:
    edit(folder, "index.parquet", lambda table: texts_with(table, "key"))
    edit(folder, "classes.parquet", lambda table: texts_with(table, "name"))
    index = load_index(folder)  # Training reads neither.
    with pytest.raises(UsageError, match=r"cannot read index\.parquet \(.*UTF8"):
        index.key(0)
    with pytest.raises(UsageError, match=r"cannot read classes\.parquet \(.*UTF8"):
        index.class_names  # noqa: B018 (reads)


def test_a_missing_class_name_is_refused(folder: Path) -> None:
    edit(folder, "classes.parquet", with_value("name", 2, None))
    with pytest.raises(UsageError, match=r"classes\.parquet \(name has rows without a value\)"):
        load_index(folder).class_names  # noqa: B018 (reads)


SIDECARS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "missing value": with_value("offset", 2, None),
    "beyond the shard": with_value("offset", 2, 10**9),
    "beyond the shard with its size": with_value("size", 2, 10**9),
    "negative": with_value("size", 2, -5),
    "label outside": with_value("cls_offset", 2, 10**9),
    "no text": lambda table: texts_with(table, "key"),
    "another type": with_type("size", pa.float64()),
    "unknown extension": with_type("extension", pa.string()),
    "listed samples as numbers": lambda table: table.replace_schema_metadata(
        {**table.schema.metadata, b"left_out": json.dumps([[1, 2, 3, 4]]).encode()}
    ),
    "a key as number": lambda table: table.replace_schema_metadata(
        {
            **table.schema.metadata,
            b"left_out": json.dumps(
                [{"key": 1, "offset": 0, "reason": "a", "message": "b"}]
            ).encode(),
        }
    ),
    "left out without end": lambda table: table.replace_schema_metadata(
        {**table.schema.metadata, b"left_out": b"[" * 100_000}
    ),
}


@pytest.mark.parametrize("case", SIDECARS)
def test_sidecars_that_say_what_cannot_be_are_made_again(case: str, folder: Path) -> None:
    before = load_index(folder)
    path = folder / "sidecars" / "train-000000.tar.parquet"
    edit(folder / "sidecars", path.name, SIDECARS[case])
    again = build_index(folder)
    assert again.fingerprint == before.fingerprint
    for name in ("offset", "size", "checksum", "class_id"):
        assert np.array_equal(getattr(again, name), getattr(before, name))


@pytest.mark.parametrize("ids", [[1, None], ["1"], [1.5], [[1]]])
def test_quarantines_of_other_types_are_damaged(ids: list[Any], folder: Path) -> None:
    table = pa.table({"sample_id": ids})
    stamped = table.replace_schema_metadata({"fingerprint": load_index(folder).fingerprint})
    parquet.write_table(stamped, folder / "quarantine.parquet")
    with pytest.raises(UsageError, match=r"quarantine\.parquet: is damaged; run"):
        load_index(folder)


def test_an_absurd_size_asks_for_no_memory(folder: Path) -> None:
    tree = json.loads((folder / "dataset.json").read_text())
    tree["shards"][-1]["bytes"] = 2**59
    (folder / "dataset.json").write_text(json.dumps(tree))
    edit(folder, "index.parquet", with_value("size", 47, 2**58))
    # Without a look at the tars, as the command that searches for damage reads an index.
    assert main(["verify", "--processes", "1", str(folder)]) == 1
