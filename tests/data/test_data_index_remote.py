"""Shards at URLs are indexed by streaming each once, through faults, and like local ones."""

from __future__ import annotations

import argparse
import json
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow.parquet as parquet
import pytest
from shard_server import serving
from tiny_images import image_of, png

from dist_dml.data import index_command, shard_files
from dist_dml.data import verify as verify_command
from dist_dml.data.index import load_index, load_unchecked
from dist_dml.data.index_command import ScanOptions, build_index, build_remote_index
from dist_dml.data.reader import open_reader, read_image
from dist_dml.data.shards import write_shard
from dist_dml.data.verify import verify
from dist_dml.data_config import StorageConfig
from dist_dml.errors import RunError, UsageError


@pytest.fixture
def server(shard_folder, monkeypatch):
    """The shards on a web server, which is asked again without long pauses."""

    def quick():
        return StorageConfig(retries=2, retry_seconds=0.01)

    monkeypatch.setattr(shard_files, "StorageConfig", quick)
    monkeypatch.setattr(verify_command, "StorageConfig", quick)
    with serving() as state:
        for path in shard_folder.glob("*.tar"):
            state.files[f"set/{path.name}"] = path.read_bytes()
        yield state


def indexed(server, out, pattern="set/*.tar", **options):
    return build_remote_index(
        f"{server.url}/{pattern}", out, processes=1, options=ScanOptions(**options)
    )


def test_the_index_is_that_of_the_local_shards(server, tmp_path, index):
    remote = indexed(server, tmp_path)
    assert remote.fingerprint == index.fingerprint
    for name in ("split", "class_id", "shard", "offset", "size", "extension", "checksum"):
        assert np.array_equal(getattr(remote, name), getattr(index, name))
    assert remote.shards == tuple(f"{server.url}/set/{name}" for name in index.shards)
    entries = json.loads((tmp_path / "dataset.json").read_text())["shards"]
    for entry in entries:
        content = server.files[entry["name"].removeprefix(server.url + "/")]
        assert entry["bytes"] == len(content)
        assert entry["tag"]
        assert "modified" not in entry


def test_its_images_are_read_through_the_cache(server, tmp_path, monkeypatch):
    remote = indexed(server, tmp_path / "index")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    reader = open_reader(remote, 3)
    for i in (0, 20, 47):
        assert np.array_equal(read_image(remote, reader, i), image_of(i))


def test_each_shard_is_streamed_once(server, tmp_path):
    indexed(server, tmp_path)
    gets = Counter((name, start) for name, start in server.requests if name.endswith(".tar"))
    sizes = {name: len(content) for name, content in server.files.items()}
    # Asked for their size and tag before and after, and read from the start once.
    assert all(count <= 4 and start < sizes[name] for (name, start), count in gets.items())


def test_faults_are_retried_from_where_they_struck(server, tmp_path, index):
    name = "set/train-000000.tar"
    server.faults[name].extend([503, None, ("cut", 5000), 500])
    server.faults["set/seen-000000.tar"].extend([None, ("cut", 100), ("cut", 1500)])
    assert indexed(server, tmp_path).fingerprint == index.fingerprint


def test_a_server_that_stays_down_ends_the_command_in_one_line(server, tmp_path):
    server.always["set/train-000001.tar"] = 503
    with pytest.raises(RunError, match=r"train-000001\.tar") as caught:
        indexed(server, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "dataset.json").exists()


def test_an_unchanged_shard_is_not_read_again_and_another_tag_is(server, tmp_path, monkeypatch):
    read = []
    scan = shard_files._scan_remote

    def counting(job):
        read.append(job.shard.base)
        return scan(job)

    monkeypatch.setattr(shard_files, "_scan_remote", counting)
    first = indexed(server, tmp_path)
    assert len(read) == 4
    assert indexed(server, tmp_path).fingerprint == first.fingerprint
    assert len(read) == 4
    name = "set/test-000000.tar"
    data = bytearray(server.files[name])
    data[int(first.offset[first.select("test")[0]]) + 40] ^= 1
    server.files[name] = bytes(data)
    assert indexed(server, tmp_path).fingerprint != first.fingerprint
    assert read[4:] == ["test-000000.tar"]
    server.tags = False  # Nobody can say any more whether they are the same.
    indexed(server, tmp_path)
    assert len(read) == 9


def test_a_range_in_braces_is_written_out(server, tmp_path):
    remote = indexed(server, tmp_path, "set/train-{000000..000001}.tar")
    assert len(remote) == 31
    assert [name[-10:] for name in remote.shards] == ["000000.tar", "000001.tar"]
    assert remote.split_names == ("train",)


@pytest.mark.parametrize("cut", [700, 3000])
def test_a_truncated_shard_is_refused_or_loses_its_end(server, tmp_path, cut):
    name = "set/train-000001.tar"
    server.files[name] = server.files[name][: -cut - 10240]
    with pytest.raises(UsageError, match=r"train-000001\.tar: cut short"):
        indexed(server, tmp_path)
    remote = indexed(server, tmp_path, damaged="skip")
    assert remote.metadata["left_out"]["cut_short"] == 2
    rows = parquet.read_table(tmp_path / "left_out.parquet").to_pylist()
    assert rows[0]["shard"] == f"{server.url}/{name}"


def test_a_shard_that_changes_while_it_is_read_is_refused(server, tmp_path, shard_folder):
    name = "set/train-000001.tar"
    other = server.files["set/train-000000.tar"]
    asked = []

    def swap(requested):
        asked.append(requested)
        if requested == name and asked.count(name) == 3:
            server.files[name] = other

    server.on_request = swap
    with pytest.raises(RunError, match=r"train-000001\.tar"):
        indexed(server, tmp_path)


def test_memory_does_not_grow_with_the_shard(server, tmp_path):
    """48 MiB of images, of which the largest has 12."""
    data = [png(image_of(i)) + bytes(12 << 20) for i in range(4)]
    samples = [{"__key__": str(i), "png": data[i], "cls": b"c"} for i in range(4)]
    write_shard(tmp_path / "big-000000.tar", samples)
    server.files = {"set/big-000000.tar": (tmp_path / "big-000000.tar").read_bytes()}
    del data, samples
    job = shard_files.ScanJob(
        shard_files.remote_shards(f"{server.url}/set/*.tar")[0],
        tmp_path / "x.parquet",
        "label",
        None,
        False,
        "refuse",
    )
    tracemalloc.start()
    scan = shard_files._scan_remote(job)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(scan.keys) == 4
    assert peak < 40 << 20


def test_verify_streams_the_shards_and_tells_damage_from_storage(server, tmp_path):
    remote = indexed(server, tmp_path)
    assert verify(load_unchecked(tmp_path)) == []
    damaged = int(remote.select("test")[2])
    data = bytearray(server.files["set/test-000000.tar"])
    data[int(remote.offset[damaged]) + 40] ^= 1
    server.files["set/test-000000.tar"] = bytes(data)
    server.always["set/seen-000000.tar"] = 503
    found = verify(load_unchecked(tmp_path))
    kinds = Counter(verdict.kind for verdict in found)
    assert kinds == {"checksum": 1, "storage": 6}
    assert load_index(tmp_path).fingerprint == remote.fingerprint  # No look at the network.


def test_remote_shards_cannot_start_from_files_beside_them_nor_be_exported(server, tmp_path):
    with pytest.raises(UsageError, match="--from dali reads files beside local tars"):
        indexed(server, tmp_path, start="dali")
    with pytest.raises(UsageError, match=r"nothing|no file"):
        indexed(server, tmp_path, "set/other-*.tar")
    indexed(server, tmp_path)
    parser = argparse.ArgumentParser()
    index_command.add_arguments(parser)
    with pytest.raises(UsageError, match="--export dali reads local shards"):
        index_command.run(parser.parse_args([str(tmp_path), "--export", "dali"]))


@pytest.mark.slow
def test_the_command_streams_several_at_a_time(server, tmp_path, index, capsys, monkeypatch):
    monkeypatch.setattr(index_command, "_REMOTE_PROCESSES", 2)
    parser = argparse.ArgumentParser()
    index_command.add_arguments(parser)
    words = ["--remote", f"{server.url}/set/", "--out", str(tmp_path / "out")]
    assert index_command.run(parser.parse_args(words)) == 0
    assert index.fingerprint[:12] in capsys.readouterr().out
    assert load_index(tmp_path / "out").fingerprint == index.fingerprint


def test_a_joined_index_of_local_and_remote_shards_reads_both(server, tmp_path, index, monkeypatch):
    from dist_dml.data.index_joining import join_indexes

    remote = indexed(server, tmp_path / "index")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    joined = join_indexes([(index, "train"), (remote, "train")], "by_name")
    assert joined.num_classes == index.num_classes
    reader = open_reader(joined, 3)
    for part, sample in ((0, 20), (1, len(index) + 3)):
        assert joined.part is not None
        assert joined.part[sample] == part
        number = int(joined.key(sample).rpartition("/")[2])
        assert np.array_equal(read_image(joined, reader, sample), image_of(number))


def test_the_local_index_beside_it_is_built_from_the_same_scan(server, tmp_path, shard_folder):
    remote = indexed(server, tmp_path / "remote", "set/seen-000000.tar")
    local = build_index(shard_folder / "seen-000000.tar", out=tmp_path / "local")
    assert remote.fingerprint == local.fingerprint
