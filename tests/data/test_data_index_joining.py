"""A mixture is one index in which nothing is lost, renamed or leaked."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dist_dml.data.index import load_index
from dist_dml.data.index_command import build_index, describe
from dist_dml.data.index_joining import join_indexes
from dist_dml.data.quarantine import QuarantineEntry, write_quarantine
from dist_dml.data.shards import write_shard
from dist_dml.errors import UsageError


def data_set(folder, **splits):
    """A data set with these labels in each split; its images tell which sample they are."""
    folder.mkdir()
    for split, labels in splits.items():
        write_shard(
            folder / f"{split}-000000.tar",
            [
                {
                    "__key__": f"{folder.name}-{split}{i}",
                    "jpg": f"{folder.name}-{split}{i}".encode(),
                    "cls": label.encode(),
                }
                for i, label in enumerate(labels)
            ],
        )
    return build_index(folder)


@pytest.fixture
def parts(tmp_path):
    return [
        (data_set(tmp_path / "a", train="xyx", test="pq"), "train"),
        (data_set(tmp_path / "b", train="yzzw", test="r"), "train"),
        (data_set(tmp_path / "c", val="zv", train="u"), "val"),
    ]


def named(joined):
    """The class name of every sample that is trained on, by key."""
    return {
        joined.key(i): joined.class_names[joined.class_id[i]]
        for i in joined.select("train").tolist()
    }


def test_one_part_is_unchanged(parts):
    assert join_indexes(parts[:1], "own") is parts[0][0]


@pytest.mark.parametrize("classes", ["own", "by_name"])
def test_every_sample_keeps_its_key_bytes_and_class_name(parts, classes):
    joined = join_indexes(parts, classes)
    assert len(joined) == 5 + 4 + 2
    wanted = {f"a-train{i}": name for i, name in enumerate("xyx")}
    wanted |= {f"b-train{i}": name for i, name in enumerate("yzzw")}
    wanted |= {f"c-val{i}": name for i, name in enumerate("zv")}
    assert named(joined) == wanted
    for i in range(len(joined)):
        with open(joined.shard_location(int(joined.shard[i])), "rb") as stream:
            stream.seek(int(joined.offset[i]))
            assert stream.read(int(joined.size[i])).decode() == joined.key(i)


def test_samples_and_splits_of_the_first_keep_their_ids(parts):
    joined, first = join_indexes(parts, "own"), parts[0][0]
    for i in range(len(first)):
        assert joined.key(i) == first.key(i)
    assert joined.select("test").tolist() == first.select("test").tolist()
    assert joined.split_names == first.split_names
    assert joined.part is not None
    assert joined.part.tolist() == [0] * 5 + [1] * 4 + [2] * 2
    assert joined.metadata["samples_per_split"] == {"test": 2, "train": 3 + 4 + 2}
    assert "11 samples (test 2, train 9)" in describe(joined)


def test_own_classes_are_different_ones(parts):
    joined = join_indexes(parts, "own")
    assert joined.class_names == (*"xy", *"wyz", *"vz", *"pq")
    assert joined.num_classes == 7
    chosen = joined.select("train")
    assert joined.class_id[chosen].tolist() == [0, 1, 0, 3, 4, 4, 2, 6, 5]
    assert joined.class_id[joined.select("test")].tolist() == [7, 8]
    assert joined.class_counts("train", 7).tolist() == [2, 1, 1, 1, 2, 1, 1]


def test_classes_by_name_are_the_same(parts):
    joined = join_indexes(parts, "by_name")
    assert joined.class_names == (*"xy", *"wz", *"v", *"pq")
    assert joined.num_classes == 5
    assert joined.class_id[joined.select("train")].tolist() == [0, 1, 0, 1, 3, 3, 2, 3, 4]
    assert joined.class_counts("train", 5).tolist() == [2, 2, 1, 3, 1]
    joined.check_labels("train", 5)


def test_a_held_out_class_is_not_trained_on_by_its_name(tmp_path):
    first = data_set(tmp_path / "a", train="xy", test="p")
    second = data_set(tmp_path / "b", train="xp")
    with pytest.raises(UsageError, match=r"class 'p' of .*b, split 'train', is held out"):
        join_indexes([(first, "train"), (second, "train")], "by_name")
    assert join_indexes([(first, "train"), (second, "train")], "own").num_classes == 4


def test_the_fingerprint_changes_with_every_part_split_order_and_rule(parts):
    a, b, c = parts
    seen = {
        join_indexes(mixture, classes).fingerprint
        for mixture, classes in (
            (parts, "own"),
            (parts, "by_name"),
            ([a, c, b], "own"),
            ([a, b], "own"),
            ([a, b, (c[0], "train")], "own"),
            ([a, (dataclasses.replace(b[0], fingerprint="0" * 64), "train"), c], "own"),
        )
    }
    assert len(seen) == 6
    assert join_indexes(parts, "own").fingerprint in seen


def test_quarantined_samples_of_every_part_are_left_out(parts, tmp_path):
    for name, row in (("a", 3), ("b", 2)):
        index = load_index(tmp_path / name)
        entry = QuarantineEntry.of(index, row, "checksum", "test")
        write_quarantine(tmp_path / name / "quarantine.parquet", [entry], index.fingerprint)
    fresh = [(load_index(index.folder), split) for index, split in parts]
    before, joined = join_indexes(parts, "own"), join_indexes(fresh, "own")
    gone = {parts[0][0].key(3), parts[1][0].key(2)}
    assert set(named(before)) - set(named(joined)) == gone
    assert joined.fingerprint != before.fingerprint
    assert joined.num_classes == before.num_classes


def test_a_missing_split_and_too_many_parts_are_refused(parts):
    with pytest.raises(UsageError, match="no samples of split 'val'"):
        join_indexes([parts[0], (parts[1][0], "val")], "own")
    with pytest.raises(UsageError, match="no samples of split 'val'"):
        join_indexes([(parts[0][0], "val"), parts[1]], "own")
    with pytest.raises(UsageError, match="128 data sets, 127 at most"):
        join_indexes([parts[0], *[parts[1]] * 127], "own")


def test_columns_agree_with_those_of_the_parts(parts):
    joined = join_indexes(parts, "own")
    chosen = [np.arange(5), *(index.select(split) for index, split in parts[1:])]
    for name in ("offset", "size", "checksum", "extension"):
        wanted = [getattr(i, name)[ids] for (i, _), ids in zip(parts, chosen, strict=True)]
        assert np.array_equal(getattr(joined, name), np.concatenate(wanted))
    assert len(joined.shards) == 2 + 2 + 2
    assert len(joined.metadata["shards"]) == 6
