"""Scans are kept per shard, used again for the same bytes only, and everything appears whole."""

from __future__ import annotations

import argparse
import json
import os
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest
from tiny_images import NUM_CLASSES, image_of, png

from dist_dml.data import index_command, shard_files
from dist_dml.data.index import load_index
from dist_dml.data.index_command import ScanOptions, build_index
from dist_dml.data.shards import write_shard
from dist_dml.data.sidecar import sidecar_path
from dist_dml.errors import UsageError


@pytest.fixture
def folder(shard_folder, tmp_path):
    """A copy of the shards, without an index."""
    copy = tmp_path / "data"
    copy.mkdir()
    for tar in shard_folder.glob("*.tar"):
        shutil.copy2(tar, copy)
    return copy


@pytest.fixture
def scanned(monkeypatch):
    """The shards that are really read, by name."""
    names = []
    scan = shard_files._scan_local

    def counting(job):
        names.append(job.shard.base)
        return scan(job)

    monkeypatch.setattr(shard_files, "_scan_local", counting)
    return names


def files_of(folder):
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tar"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_second_run_reads_no_shard_and_writes_the_same_files(folder, scanned):
    first = build_index(folder)
    assert len(scanned) == 4
    written = files_of(folder)
    second = build_index(folder)
    assert len(scanned) == 4
    assert files_of(folder) == written
    assert second.fingerprint == first.fingerprint


def test_only_the_shard_that_changed_is_read_again(folder, scanned):
    build_index(folder)
    del scanned[:]
    samples = [{"__key__": f"n{i}", "png": png(image_of(i)), "cls": b"c1"} for i in range(3)]
    write_shard(folder / "train-000001.tar", samples)
    changed = build_index(folder)
    assert scanned == ["train-000001.tar"]
    assert len(changed) == 6 + 11 + 17 + 3
    fresh = build_index(folder, out=folder.parent / "fresh")
    assert fresh.fingerprint == changed.fingerprint
    assert np.array_equal(fresh.offset, changed.offset)


def test_a_shard_of_the_same_size_and_another_time_is_read_again(folder, scanned):
    index = build_index(folder)
    tar = folder / "seen-000000.tar"
    data = bytearray(tar.read_bytes())
    data[int(index.offset[0]) + 40] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(1, 1))
    del scanned[:]
    assert build_index(folder).fingerprint != index.fingerprint
    assert scanned == ["seen-000000.tar"]


def test_rescan_reads_all_and_another_label_key_too(folder, scanned):
    build_index(folder)
    build_index(folder, options=ScanOptions(rescan=True))
    assert len(scanned) == 8
    build_index(folder, label_key="species")
    assert len(scanned) == 12


def test_a_damaged_sidecar_is_made_again(folder, scanned):
    index = build_index(folder)
    path = sidecar_path(folder, "seen-000000.tar")
    path.write_bytes(path.read_bytes()[:-100])
    assert build_index(folder).fingerprint == index.fingerprint
    assert scanned[4:] == ["seen-000000.tar"]
    assert parquet.read_table(path).num_rows == 6


def test_a_sidecar_has_a_row_for_every_sample(folder):
    index = build_index(folder)
    path = folder / "sidecars" / "test-000000.tar.parquet"
    table = parquet.read_table(path)
    chosen = index.select("test")
    assert table["key"].to_pylist() == [index.key(i) for i in chosen.tolist()]
    assert table["extension"].to_pylist() == ["png"] * 11
    assert table["width"].to_pylist() == [24] * 11
    assert table["height"].to_pylist() == [20] * 11
    assert np.array_equal(table["checksum"].to_numpy(), index.checksum[chosen])
    data = (folder / "test-000000.tar").read_bytes()
    rows = zip(*(table[n].to_pylist() for n in ("label", "cls_offset", "cls_size")), strict=True)
    for number, (label, offset, size) in enumerate(rows, start=6):
        assert data[offset : offset + size].decode() == label == f"t{number % NUM_CLASSES}"
    made_from = json.loads(parquet.read_schema(path).metadata[b"made_from"])
    state = (folder / "test-000000.tar").stat()
    assert (made_from["bytes"], made_from["modified"]) == (state.st_size, state.st_mtime_ns)


def test_img2datasets_own_parquet_is_left_alone(folder):
    own = folder / "test-000000.parquet"
    own.write_bytes(b"theirs")
    build_index(folder)
    assert own.read_bytes() == b"theirs"


def test_shards_of_one_name_in_two_folders_keep_two_scans(tmp_path):
    for name, count in {"a": 2, "b": 3}.items():
        (tmp_path / name).mkdir()
        samples = [{"__key__": f"{name}{i}", "jpg": b"1", "cls": b"x"} for i in range(count)]
        write_shard(tmp_path / name / "000.tar", samples)
    tars = [tmp_path / "a" / "000.tar", tmp_path / "b" / "000.tar"]
    for _ in range(2):
        index = build_index(tars, out=tmp_path / "out")
        assert [index.key(i) for i in range(5)] == ["a0", "a1", "b0", "b1", "b2"]
    assert len(list((tmp_path / "out" / "sidecars").iterdir())) == 2


def test_the_index_has_width_and_height(folder):
    build_index(folder)
    table = parquet.read_table(folder / "index.parquet", columns=["width", "height"])
    assert set(table["width"].to_pylist()) == {24}
    assert set(table["height"].to_pylist()) == {20}


def test_an_index_of_before_is_read_and_has_the_same_fingerprint(folder):
    """Without width, height, layout, times and sidecars, as indexes were written until 2026-11."""
    index = build_index(folder)
    new = ("width", "height")
    table = parquet.read_table(folder / "index.parquet").drop_columns(list(new))
    stamp = {"fingerprint": index.fingerprint}
    parquet.write_table(table.replace_schema_metadata(stamp), folder / "index.parquet")
    content = json.loads((folder / "dataset.json").read_text())
    del content["layout"]
    for shard in content["shards"]:
        del shard["modified"]
    (folder / "dataset.json").write_text(json.dumps(content))
    shutil.rmtree(folder / "sidecars")
    old = load_index(folder)
    assert old.fingerprint == index.fingerprint
    assert np.array_equal(old.offset, index.offset)
    os.utime(folder / "seen-000000.tar", ns=(1, 1))
    assert load_index(folder).num_without_size() == 0


def test_a_copy_with_other_times_is_accepted_and_changed_bytes_are_not(folder):
    index = build_index(folder)
    tar = folder / "train-000000.tar"
    os.utime(tar, ns=(1, 1))
    assert load_index(folder).fingerprint == index.fingerprint
    rows = np.flatnonzero(index.shard == index.shards.index(tar.name))
    whole = tar.read_bytes()
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        damaged = bytearray(whole)
        damaged[int(index.offset[row]) + 30] ^= 1
        tar.write_bytes(damaged)
        os.utime(tar, ns=(2, 2))
        with pytest.raises(UsageError, match=rf"train-000000\.tar was changed.*sample {row} "):
            load_index(folder)


@pytest.mark.parametrize("survivors", [("index.parquet",), ("index.parquet", "classes.parquet")])
def test_an_interrupted_run_leaves_an_index_that_is_refused(folder, survivors):
    """The new files up to a point, the old ones from there on."""
    build_index(folder)
    old = {name: (folder / name).read_bytes() for name in ("classes.parquet", "dataset.json")}
    samples = [{"__key__": f"n{i}", "png": png(image_of(i)), "cls": b"c9"} for i in range(3)]
    write_shard(folder / "train-000001.tar", samples)
    build_index(folder)
    for name, content in old.items():
        if name not in survivors:
            (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match="dist-dml index"):
        load_index(folder)


def test_an_interrupted_run_over_the_same_samples_cut_otherwise_is_refused(tmp_path):
    """The fingerprint is the same, so the layout has to tell the two apart."""
    samples = [{"__key__": str(i), "jpg": bytes(100), "cls": b"x"} for i in range(4)]
    write_shard(tmp_path / "train-000000.tar", samples[:1])
    write_shard(tmp_path / "train-000001.tar", samples[1:])
    first = build_index(tmp_path)
    old = (tmp_path / "dataset.json").read_bytes()
    write_shard(tmp_path / "train-000000.tar", samples[:3])
    write_shard(tmp_path / "train-000001.tar", samples[3:])
    assert build_index(tmp_path).fingerprint == first.fingerprint
    (tmp_path / "dataset.json").write_bytes(old)
    with pytest.raises(UsageError, match="of different data sets"):
        load_index(tmp_path)


def test_a_run_that_fails_leaves_the_old_index(folder, monkeypatch):
    index = build_index(folder)
    written = {name: (folder / name).read_bytes() for name in ("index.parquet", "dataset.json")}
    tar = folder / "train-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-12000])
    with pytest.raises(UsageError, match="cut short"):
        build_index(folder)
    assert {name: (folder / name).read_bytes() for name in written} == written
    assert not list(folder.rglob("*.tmp"))
    tar.write_bytes(whole)
    assert load_index(folder).fingerprint == index.fingerprint


def test_a_shard_that_changes_while_it_is_scanned_is_refused(folder, monkeypatch):
    scan = shard_files.scan_members

    def slow(members, reader, label_key, labels):
        found = scan(members, reader, label_key, labels)
        with (folder / "train-000001.tar").open("ab") as stream:
            stream.write(bytes(512))
        return found

    monkeypatch.setattr(shard_files, "scan_members", slow)
    with pytest.raises(UsageError, match="changed while it was scanned"):
        build_index(folder / "train-000001.tar", out=folder.parent / "out")


def test_the_command_takes_the_options(folder, scanned, capsys):
    parser = argparse.ArgumentParser()
    index_command.add_arguments(parser)
    assert index_command.run(parser.parse_args([str(folder)])) == 0
    assert index_command.run(parser.parse_args([str(folder), "--rescan"])) == 0
    assert len(scanned) == 8
    for wrong in ([], [str(folder), "--remote", "s3://b/x"], ["--remote", "s3://b/x"]):
        with pytest.raises(UsageError, match="--remote"):
            index_command.run(parser.parse_args(wrong))
