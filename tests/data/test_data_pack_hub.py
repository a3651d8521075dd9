"""Image sets of Hugging Face `datasets` are read from their files alone, in each of their layouts.

The fixtures are written as `datasets` 2 and 3 write them: Arrow streams with `state.json`, Parquet
with the features in the schema's metadata.
"""

from __future__ import annotations

import argparse
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import simplejpeg
from tiny_images import image_of, png

from dist_dml.data.index import load_index
from dist_dml.data.pack import hub as hub_module
from dist_dml.data.pack.hub import pack_hub
from dist_dml.data.pack.hub_division import HubDivision
from dist_dml.data.reader import open_reader, read_image
from dist_dml.errors import RunError, UsageError

NAMES = ["zebra", "ant", "cat", "bee", "dog", "eel"]
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": NAMES, "_type": "ClassLabel"},
    "width": {"dtype": "int32", "_type": "Value"},
}
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
OWN, BY_CLASS = HubDivision(rule="own"), HubDivision(rule="classes")
KEEP = HubDivision(test_fraction=0.0, seen_per_class=0)


def encoded(number: int) -> bytes:
    if number % 2:
        return png(image_of(number))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image_of(number)), 95, "RGB", "444")


def table_of(numbers, label_of=lambda n: n % 6, features=FEATURES) -> pyarrow.Table:
    """Rows whose image tells their number."""
    fields = [("image", IMAGE), ("label", pyarrow.int64()), ("width", pyarrow.int32())]
    schema = pyarrow.schema(fields)
    if features:
        text = json.dumps({"info": {"features": features}, "fingerprint": "0"})
        schema = schema.with_metadata({"huggingface": text})
    columns = {
        "image": [{"bytes": encoded(n), "path": f"{n}.jpg"} for n in numbers],
        "label": [label_of(n) for n in numbers],
        "width": [24 for _ in numbers],
    }
    return pyarrow.table(columns, schema=schema)


def save_arrow(folder, tables, split="train", rows=4):
    """One split as `save_to_disk` writes it: Arrow streams and their list."""
    folder.mkdir(parents=True)
    names = []
    for number, table in enumerate(tables):
        names.append(f"data-{number:05d}-of-{len(tables):05d}.arrow")
        with (
            pyarrow.OSFile(str(folder / names[-1]), "wb") as sink,
            pyarrow.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=rows)
    state = {"_data_files": [{"filename": n} for n in names], "_split": split, "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


def save_dict(folder, splits):
    """A DatasetDict as `save_to_disk` writes it."""
    for name, tables in splits.items():
        save_arrow(folder / name, tables, name)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    return folder


def save_parquet(folder, files, rows=4):
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, folder / name, row_group_size=rows)
    return folder


def pack_one(src, out, **options):
    return pack_hub(src, out, processes=1, **options)


def stored(index) -> dict[str, tuple[str, bytes]]:
    """Class and image bytes by key."""
    found = {}
    for row in range(len(index)):
        shard = index.shard_path(int(index.shard[row])).read_bytes()
        data = shard[index.offset[row] :][: index.size[row]]
        found[index.key(row)] = (index.class_names[index.class_id[row]], data)
    return found


def expected(split: str, numbers, label_of=lambda n: n % 6) -> dict[str, tuple[str, bytes]]:
    return {f"{split}/{row:08d}": (NAMES[label_of(n)], encoded(n)) for row, n in enumerate(numbers)}


def classes_of(index):
    return {
        split: {index.class_names[c] for c in index.class_id[index.select(split)]}
        for split in index.split_names
    }


def refusal(call, kind: type[Exception] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_dataset_comes_whole_with_its_class_names(tmp_path):
    src = save_arrow(tmp_path / "src", [table_of(range(10)), table_of(range(10, 23))])
    index = pack_one(src, tmp_path / "out", division=KEEP, shard_samples=5)
    assert stored(index) == expected("train", range(23))
    assert index.class_names == tuple(sorted(NAMES))
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        texts = {m.name: tar.extractfile(m) for m in tar if m.name.endswith(".json")}
        name, stream = next(iter(texts.items()))
        assert stream is not None
        described = json.loads(stream.read())
    row = int(name.removesuffix(".json").rpartition("/")[2])
    assert described == {
        "width": 24,
        "label": NAMES[row % 6],
        "label_id": row % 6,
        "split": "train",
        "row": row,
        "path": f"{row}.jpg",
    }
    assert read_image(index, open_reader(index, 3), 0).shape == (20, 24, 3)


@pytest.mark.parametrize(
    "name",
    [
        "data/train-00000-of-00001.parquet",
        "data/train-00000-of-00001-5c21f1ff2bf1f9a9.parquet",
        "train/0000.parquet",
        "default/train/0000.parquet",
        "train.parquet",
        "beans-train-00000-of-00001.parquet",
    ],
)
def test_parquet_of_the_hub_is_the_same_data_set(tmp_path, name):
    src = save_parquet(tmp_path / "src", {name: table_of(range(23))})
    (src / ".cache").mkdir()
    (src / ".cache" / "x.parquet").write_bytes(b"a record of the client")
    index = pack_one(src, tmp_path / "out", division=KEEP)
    assert stored(index) == expected("train", range(23))
    alone = pack_one(src / name, tmp_path / "alone", division=KEEP)
    assert {v for v in stored(alone).values()} == set(stored(index).values())


def test_arrow_files_with_a_footer_are_read_too(tmp_path):
    table = table_of(range(9))
    (tmp_path / "src").mkdir()
    with (
        pyarrow.OSFile(str(tmp_path / "src" / "train.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=4)
    index = pack_one(tmp_path / "src", tmp_path / "out", division=KEEP)
    assert stored(index) == expected("train", range(9))


def test_shards_mix_units_and_the_order_depends_on_the_seed(tmp_path):
    """A source that is sorted by class does not make shards of single classes."""
    table = table_of(range(96), label_of=lambda n: n // 16)
    src = save_parquet(tmp_path / "src", {"train.parquet": table}, rows=4)
    index = pack_one(src, tmp_path / "a", division=KEEP, shard_samples=24)
    for shard in range(4):
        assert len(set(index.class_id[index.shard == shard].tolist())) > 1
    other = HubDivision(seed=1, test_fraction=0.0, seen_per_class=0)
    again = pack_one(src, tmp_path / "b", division=other, shard_samples=24)
    assert stored(again) == stored(index)
    assert [again.key(i) for i in range(96)] != [index.key(i) for i in range(96)]


def test_one_split_is_divided_by_class(tmp_path):
    src = save_arrow(tmp_path / "src", [table_of(range(60))])
    index = pack_one(src, tmp_path / "out")
    found = classes_of(index)
    assert found["train"] == found["seen"]
    assert len(found["train"]) == len(found["test"]) == 3
    assert not found["train"] & found["test"]
    assert len(index.select("seen")) == 6
    assert stored(index) == expected("train", range(60))


def test_splits_of_the_same_classes_are_seen(tmp_path, capsys):
    splits = {
        "train": [table_of(range(24))],
        "validation": [table_of(range(24, 30))],
        "test": [table_of(range(30, 42))],
    }
    index = pack_one(save_dict(tmp_path / "src", splits), tmp_path / "out")
    assert index.metadata["samples_per_split"] == {"seen": 12, "seen_val": 6, "train": 24}
    noted = capsys.readouterr().err
    assert "split test holds images of training classes only and is called seen" in noted
    everything = expected("train", range(24)) | expected("validation", range(24, 30))
    assert stored(index) == everything | expected("test", range(30, 42))


def test_splits_of_other_classes_keep_their_names(tmp_path):
    splits = {
        "train": [table_of(range(12), lambda n: n % 3)],
        "test": [table_of(range(12), lambda n: 4 + n % 2)],
        "validation": [table_of(range(6), lambda n: 3)],
    }
    index = pack_one(save_dict(tmp_path / "src", splits), tmp_path / "out")
    assert classes_of(index) == {
        "train": {"zebra", "ant", "cat"},
        "test": {"dog", "eel"},
        "val": {"bee"},
    }


def test_splits_that_share_some_classes_are_refused_or_divided_by_class(tmp_path):
    splits = {
        "train": [table_of(range(32), lambda n: n % 4)],
        "test": [table_of(range(32), lambda n: 2 + n % 4)],
    }
    src = save_dict(tmp_path / "src", splits)
    message = refusal(lambda: pack_one(src, tmp_path / "out"))
    assert "class 'bee' is in train and in test (2 such classes of its 4)" in message
    found = classes_of(pack_one(src, tmp_path / "out", division=BY_CLASS))
    assert not found["train"] & found["test"]
    assert found["train"] | found["test"] == set(NAMES)
    some = HubDivision(splits="test=train")
    index = pack_one(src, tmp_path / "some", division=some)
    assert index.metadata["samples_per_split"] == {"train": 32}


def test_hidden_labels_are_refused_and_their_split_can_be_left_out(tmp_path):
    splits = {"train": [table_of(range(12))], "test": [table_of(range(6), lambda n: -1)]}
    src = save_dict(tmp_path / "src", splits)
    message = refusal(lambda: pack_one(src, tmp_path / "out"))
    assert "row 0 of test: label -1 is none of the 6 classes" in message
    assert "--splits train=train" in message
    index = pack_one(src, tmp_path / "out", division=HubDivision(splits="train=train"))
    assert stored(index) == expected("train", range(12))


def test_columns_without_features_are_found_by_their_types(tmp_path):
    plain = pyarrow.table(
        {
            "picture": pyarrow.array([encoded(n) for n in range(8)], pyarrow.binary()),
            "label": [f"name {n % 2}" for n in range(8)],
            "score": [0.5, float("nan")] * 4,
            "tags": [["x"]] * 8,
            "row": [7] * 8,
        }
    )
    src = save_parquet(tmp_path / "src", {"train.parquet": plain})
    index = pack_one(src, tmp_path / "out", division=KEEP)
    assert set(index.class_names) == {"name 0", "name 1"}
    assert sorted(data for _, data in stored(index).values()) == sorted(map(encoded, range(8)))
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        stream = tar.extractfile("train/00000001.json")
        assert stream is not None
        assert json.loads(stream.read()) == {
            "score": None,
            "tags": ["x"],
            "row_": 7,
            "label": "name 1",
            "split": "train",
            "row": 1,
        }


def test_a_column_that_is_not_clear_is_asked_for(tmp_path):
    features = {"image": {"_type": "Image"}, "fine": {"names": NAMES, "_type": "ClassLabel"}}
    features["coarse"] = {"names": ["even", "odd"], "_type": "ClassLabel"}
    table = table_of(range(12), features=None).rename_columns(["image", "fine", "width"])
    table = table.append_column("coarse", pyarrow.array([n % 2 for n in range(12)]))
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    src = save_parquet(tmp_path / "src", {"train.parquet": table})
    message = refusal(lambda: pack_one(src, tmp_path / "out"))
    assert "several could be it: fine, coarse); name it with --label-column" in message
    message = refusal(lambda: pack_one(src, tmp_path / "out", label_column="x"))
    assert "'x' is no column" in message
    index = pack_one(src, tmp_path / "out", label_column="coarse", division=KEEP)
    assert index.class_names == ("even", "odd")
    message = refusal(lambda: pack_one(src, tmp_path / "b", image_column="picture"))
    assert "--image-column" in message


def test_what_is_no_data_set_is_refused_with_the_expected_layout(tmp_path):
    assert "no such folder or file; expected a folder of save_to_disk" in refusal(
        lambda: pack_one(tmp_path / "absent", tmp_path / "out")
    )
    (tmp_path / "empty").mkdir()
    assert "holds no data set; expected" in refusal(
        lambda: pack_one(tmp_path / "empty", tmp_path / "out")
    )
    two = {f"{c}/train/0000.parquet": table_of(range(3)) for c in ("en", "fr")}
    message = refusal(lambda: pack_one(save_parquet(tmp_path / "two", two), tmp_path / "out"))
    assert "holds several configurations" in message


def test_damaged_and_missing_files_are_named(tmp_path):
    src = save_dict(tmp_path / "a", {"train": [table_of(range(9))], "test": [table_of(range(3))]})
    file = src / "train" / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert f"{file}: no readable arrow file" in refusal(lambda: pack_one(src, tmp_path / "out"))
    file.unlink()
    assert "state.json names it" in refusal(lambda: pack_one(src, tmp_path / "out"))
    file.write_bytes(whole)
    state = src / "train" / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../../secret"))
    assert "names no data files" in refusal(lambda: pack_one(src, tmp_path / "out"))
    state.unlink()
    assert "state.json: no such file" in refusal(lambda: pack_one(src, tmp_path / "out"))
    (src / "dataset_dict.json").write_text('{"splits": ["../x"]}')
    assert "has no list of splits" in refusal(lambda: pack_one(src, tmp_path / "out"))
    (src / "dataset_dict.json").write_text("[")
    assert "is no readable JSON object" in refusal(lambda: pack_one(src, tmp_path / "out"))
    parquet = save_parquet(tmp_path / "p", {"train.parquet": table_of(range(9))}) / "train.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-9])
    assert "train.parquet: no readable parquet file" in refusal(
        lambda: pack_one(tmp_path / "p", tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


def test_files_with_other_class_names_are_not_mixed(tmp_path):
    other = {**FEATURES, "label": {"names": NAMES[::-1], "_type": "ClassLabel"}}
    src = save_parquet(
        tmp_path / "src",
        {
            "train-00000-of-00002.parquet": table_of(range(6)),
            "train-00001-of-00002.parquet": table_of(range(6), features=other),
        },
    )
    message = refusal(lambda: pack_one(src, tmp_path / "out"))
    assert "its columns or class names differ" in message


def test_rows_without_an_image_are_named(tmp_path):
    for kind, value, expected_text in (
        ("path", {"bytes": None, "path": "/data/1.jpg"}, "only the path '/data/1.jpg'"),
        ("gif", {"bytes": b"GIF89a" + bytes(20), "path": None}, "is no JPEG, PNG or WebP image"),
        ("none", None, "holds no image"),
    ):
        table = table_of(range(6))
        images = [*table["image"].to_pylist()[:5], value]
        table = table.set_column(0, "image", pyarrow.array(images, IMAGE))
        src = save_parquet(tmp_path / kind, {"train.parquet": table})
        message = refusal(lambda s=src: pack_one(s, tmp_path / f"out {s.name}"), RunError)
        assert expected_text in message
        assert "train.parquet: row" in message


def test_an_interrupted_pack_goes_on_and_other_parameters_are_refused(tmp_path):
    src = save_arrow(tmp_path / "src", [table_of(range(23))])
    options = {"division": KEEP, "shard_samples": 6}
    first = pack_one(src, tmp_path / "out", **options)
    tars = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "out" / "train-000002.tar").unlink()
    assert pack_one(src, tmp_path / "out", **options).fingerprint == first.fingerprint
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == tars
    message = refusal(lambda: pack_one(src, tmp_path / "out"))
    assert "other parameters" in message


def test_the_command_packs_resizes_and_reports(tmp_path, capsys):
    src = save_arrow(tmp_path / "src", [table_of(range(24))])
    parser = argparse.ArgumentParser()
    hub_module.add_arguments(parser)
    arguments = [str(src), str(tmp_path / "out"), "--resize=10", "--processes=1"]
    arguments += ["--splits=train=train"]
    assert hub_module.run(parser.parse_args(arguments)) == 0
    assert "24 samples (train 24), 6 training classes" in capsys.readouterr().out
    index = load_index(tmp_path / "out")
    reader = open_reader(index, 3)
    assert {read_image(index, reader, i).shape for i in range(24)} == {(10, 12, 3)}


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path):
    src = save_arrow(tmp_path / "src", [table_of(range(24))])
    first = pack_hub(src, tmp_path / "a", shard_samples=6, processes=1)
    second = pack_hub(src, tmp_path / "b", shard_samples=6, processes=2)
    assert second.fingerprint == first.fingerprint
    for path in (tmp_path / "a").glob("*.tar"):
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
