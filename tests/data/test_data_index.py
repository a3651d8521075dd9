"""The index says where each sample lies, numbers the classes, and refuses what has changed."""

from __future__ import annotations

import argparse
import json
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest

from dist_dml.data import index_command
from dist_dml.data.index import load_index
from dist_dml.data.index_command import build_index
from dist_dml.data.shards import write_shard
from dist_dml.errors import UsageError

IMAGE = b"\xff\xd8\xff not decoded here"


def shard(folder, name, labels, **json_labels):
    """Write a shard with these `.cls` labels, keys 0, 1, ..."""
    folder.mkdir(exist_ok=True)
    write_shard(
        folder / name,
        [
            {"__key__": f"{name[:4]}{i}", "jpg": IMAGE + bytes([i]), "cls": str(label).encode()}
            for i, label in enumerate(labels)
        ],
    )
    return folder


def test_every_sample_is_in_exactly_one_split(index):
    chosen = np.concatenate([index.select(split) for split in ("train", "seen", "test")])
    assert sorted(chosen) == list(range(17 + 14 + 6 + 11))
    assert [len(index.select(s)) for s in ("train", "seen", "test")] == [31, 6, 11]


def test_training_classes_come_first_and_seen_images_share_them(index):
    assert index.num_classes == 5
    assert index.class_names == tuple(f"c{i}" for i in range(5)) + tuple(f"t{i}" for i in range(5))
    assert set(index.class_id[index.select("train")]) == set(range(5))
    assert set(index.class_id[index.select("seen")]) <= set(range(5))
    assert set(index.class_id[index.select("test")]) == set(range(5, 10))


def test_columns_agree_with_the_tars(index):
    for i in (0, 6, 20, len(index) - 1):
        data = index.shard_path(int(index.shard[i])).read_bytes()
        image = data[index.offset[i] : index.offset[i] + index.size[i]]
        assert image.startswith(b"\x89PNG")
        name = index.shards[index.shard[i]].removesuffix(".tar")
        assert index.key(i) == f"{name}/{i:04d}"
        assert index.split_names[index.split[i]] == name.split("-")[0]


def test_the_catalogue_counts_every_class(index):
    table = parquet.read_table(index.folder / "classes.parquet").to_pydict()
    assert table["class_id"] == list(range(10))
    for class_id, split, count in zip(
        table["class_id"], table["split"], table["num_samples"], strict=True
    ):
        assert split == ("train" if class_id < 5 else "test")
        assert count == np.sum(index.class_id[index.select(split)] == class_id)


def test_integer_labels_are_ordered_by_value(tmp_path):
    index = build_index(shard(tmp_path, "train-000000.tar", [10, 9, 2, 10]))
    assert index.class_names == ("2", "9", "10")
    assert index.class_id.tolist() == [2, 1, 0, 2]


def test_names_without_a_split_are_training_shards(tmp_path):
    index = build_index(shard(tmp_path, "anything.tar", ["b", "a"]))
    assert index.select("train").tolist() == [0, 1]
    assert index.class_id.tolist() == [1, 0]


def test_labels_come_from_json_where_there_is_no_cls(tmp_path, make_tar):
    make_tar(
        tmp_path / "a.tar",
        [
            ("x.jpg", b"1"),
            ("x.json", json.dumps({"species": 4, "label": "no"}).encode()),
            ("y.webp", b"2"),
            ("y.json", json.dumps({"species": "11"}).encode()),
        ],
    )
    index = build_index(tmp_path, label_key="species")
    assert index.class_names == ("4", "11")
    with pytest.raises(UsageError, match=r"key y: \.json has no 'label'.*species.*--label-key"):
        build_index(tmp_path)


def test_labels_are_taken_as_they_are_with_num_classes(tmp_path):
    shard(tmp_path, "train-000000.tar", [3, 0, 3])
    shard(tmp_path, "test-000000.tar", [7, 3, 100])
    index = build_index(tmp_path, num_classes=5)
    assert index.num_classes == 5
    assert index.class_id[index.select("train")].tolist() == [3, 0, 3]
    assert index.class_id[index.select("test")].tolist() == [5, 3, 6]
    assert index.class_names == ("0", "1", "2", "3", "4", "7", "100")


@pytest.mark.parametrize("label", ["5", "-1", "cat"])
def test_a_label_outside_the_classes_names_shard_and_key(tmp_path, label):
    shard(tmp_path, "train-000000.tar", ["0", label])
    with pytest.raises(UsageError, match=rf"train-000000\.tar: key trai1 .*'{label}'.*0\.\.4"):
        build_index(tmp_path, num_classes=5)


def test_a_classifier_with_too_few_classes_is_refused(index):
    index.check_labels("train", 5)
    with pytest.raises(UsageError, match=r"train-000000\.tar: key .*class 4 \(c4\).*0\.\.3"):
        index.check_labels("train", 4)


@pytest.mark.parametrize("content", [b"", b"  \n", b"\xff\xfe"])
def test_an_unusable_label_names_shard_and_key(tmp_path, make_tar, content):
    make_tar(tmp_path / "a.tar", [("x.jpg", b"1"), ("x.cls", content)])
    with pytest.raises(UsageError, match=r"a\.tar: key x: \.cls"):
        build_index(tmp_path)


def test_the_fingerprint_ignores_sharding_and_notices_content(tmp_path):
    samples = [{"__key__": str(i), "jpg": IMAGE, "cls": str(i).encode()} for i in range(4)]

    def fingerprint(name, *parts, source=None):
        (tmp_path / name).mkdir()
        for number, part in enumerate(parts):
            write_shard(tmp_path / name / f"train-{number:06d}.tar", part)
        return build_index(tmp_path / name, source=source).fingerprint

    whole = fingerprint("whole", samples)
    assert fingerprint("cut", samples[:1], samples[1:]) == whole
    assert fingerprint("order", samples[::-1]) != whole
    assert fingerprint("pixels", [{**samples[0], "jpg": IMAGE[::-1]}, *samples[1:]]) != whole
    assert fingerprint("label", [{**samples[0], "cls": b"9"}, *samples[1:]]) != whole
    assert fingerprint("source", samples, source={"seed": 1}) != whole


def test_scanning_in_processes_gives_the_same_index(shard_folder, index, tmp_path):
    other = build_index(shard_folder, out=tmp_path, processes=2)
    assert other.fingerprint == index.fingerprint
    assert np.array_equal(other.offset, index.offset)
    assert other.shard_path(0).read_bytes() == index.shard_path(0).read_bytes()


def test_missing_and_empty_folders_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"data\.path=.*absent: no such folder"):
        load_index(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"holds no shards \(\*\.tar\)"):
        load_index(tmp_path)
    with pytest.raises(UsageError, match=r"data\.path is empty"):
        load_index("")
    shard(tmp_path, "train-000000.tar", [0])
    with pytest.raises(UsageError, match="dist-dml index"):
        load_index(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="nothing to index"):
        build_index(tmp_path / "none")


def test_the_current_folder_can_be_the_data_set(shard_folder, index, monkeypatch):
    monkeypatch.chdir(shard_folder)
    assert load_index(".").fingerprint == index.fingerprint


def test_a_stale_index_is_refused(shard_folder, tmp_path, index):
    folder = shutil.copytree(shard_folder, tmp_path / "copy")
    assert load_index(folder).fingerprint == index.fingerprint
    tar = folder / "seen-000000.tar"
    tar.write_bytes(tar.read_bytes() + bytes(512))
    with pytest.raises(UsageError, match=r"seen-000000\.tar has \d+ bytes.*dist-dml index"):
        load_index(folder)
    tar.unlink()
    with pytest.raises(UsageError, match=r"seen-000000\.tar is missing"):
        load_index(folder)


@pytest.mark.parametrize("name", ["index.parquet", "dataset.json"])
def test_a_damaged_index_is_refused(shard_folder, tmp_path, index, name):
    folder = shutil.copytree(shard_folder, tmp_path / "copy")
    (folder / name).write_bytes(b"{damaged")
    with pytest.raises(UsageError, match="dist-dml index") as caught:
        load_index(folder)
    assert "\n" not in str(caught.value)


def test_files_of_two_indexing_runs_are_not_mixed(shard_folder, tmp_path, index):
    folder = shutil.copytree(shard_folder, tmp_path / "copy")
    old = (folder / "dataset.json").read_bytes()
    build_index(folder, source={"seed": 2})
    (folder / "dataset.json").write_bytes(old)
    with pytest.raises(UsageError, match="of different data sets"):
        load_index(folder)


def test_an_unknown_split_lists_the_known_ones(index):
    with pytest.raises(UsageError, match=r"'val'; it has: seen \(6\), test \(11\), train \(31\)"):
        index.select("val")


def test_the_command_indexes_and_reports(shard_folder, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    index_command.add_arguments(parser)
    arguments = parser.parse_args([str(shard_folder / "test-000000.tar"), "--out", str(tmp_path)])
    assert index_command.run(arguments) == 0
    printed = capsys.readouterr()
    assert "11 samples" in printed.out
    assert "no training classes" in printed.out
    assert "/s)" in printed.err
    assert len(load_index(tmp_path)) == 11
