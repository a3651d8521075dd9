"""Images of remote shards are those of local ones, through faults, changes, damage, eviction."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_server import ShardServer, serving, within

from dist_dml.data.faults import BadSample
from dist_dml.data.index import Index
from dist_dml.data.reader import Reader, check_storage, open_reader, read_image
from dist_dml.data.remote import list_remote
from dist_dml.data.retry import Retry
from dist_dml.data.shard_cache import ShardCache
from dist_dml.data_config import DataConfig, StorageConfig
from dist_dml.errors import RunError, UsageError


@pytest.fixture
def server(shard_folder: Path) -> Iterator[ShardServer]:
    with serving() as state:
        for path in shard_folder.glob("*.tar"):
            state.files[path.name] = path.read_bytes()
        yield state


@pytest.fixture
def remote(index: Index, server: ShardServer) -> Index:
    """`index`, with its tars on the server."""
    found = {file.url.rpartition("/")[2]: file for file in list_remote(f"{server.url}/*.tar")}
    server.requests.clear()
    files = [found[name] for name in index.shards]
    entries = [
        {**entry, "name": file.url, "tag": file.tag}
        for entry, file in zip(index.metadata["shards"], files, strict=True)
    ]
    metadata = {**index.metadata, "shards": entries}
    return replace(index, shards=tuple(file.url for file in files), metadata=metadata)


@pytest.fixture
def storage(tmp_path: Path) -> StorageConfig:
    return StorageConfig(
        cache=str(tmp_path / "cache"), cache_mebibytes=1, retries=3, retry_seconds=0.005
    )


def place(index: Index, sample: int) -> tuple[int, int, int, int]:
    columns = (index.shard, index.offset, index.size, index.checksum)
    first, second, third, fourth = (int(column[sample]) for column in columns)
    return first, second, third, fourth


def test_remote_images_are_those_of_the_local_shards(index, remote, storage, server):
    local, away = open_reader(index, 3), open_reader(remote, 3, storage)
    away = pickle.loads(pickle.dumps(away))
    server.faults["train-000000.tar"].extend([503, ("cut", 5_000), "drop"])
    for sample in range(len(index)):
        image = within(10, lambda sample=sample: read_image(remote, away, sample))
        assert np.array_equal(image, read_image(index, local, sample))
    asked = {name: len(server.starts(name)) for name in server.files}
    assert asked == {name: 4 if name == "train-000000.tar" else 1 for name in server.files}


def test_a_store_that_stays_away_ends_the_run_in_one_line(remote, storage, server, capsys):
    server.always["seen-000000.tar"] = 503
    reader = open_reader(remote, 3, storage)
    with pytest.raises(RunError, match=r"seen-000000\.tar: key seen.*failed 4 times.*HTTP 503"):
        within(10, lambda: read_image(remote, reader, 0))
    assert len(server.requests) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_object_that_changed_is_never_read(remote, storage, server):
    name = "seen-000000.tar"
    server.files[name] = bytes(len(server.files[name]))
    reader = open_reader(remote, 3, storage)
    with pytest.raises(RunError, match=r"changed: .*index the data set again"):
        within(10, lambda: read_image(remote, reader, 0))


def test_a_damaged_copy_is_dropped_and_the_store_asked(index, remote, storage, server):
    reader = open_reader(remote, 3, storage)
    read_image(remote, reader, 1)
    file = reader.files[0]
    assert not isinstance(file, str)
    path = reader.cache.path(file)
    data = bytearray(path.read_bytes())
    data[remote.offset[0] + 60] ^= 255
    path.write_bytes(data)
    stored = read_image(index, open_reader(index, 3), 0)
    assert np.array_equal(within(10, lambda: read_image(remote, reader, 0)), stored)
    assert not path.exists()
    assert np.array_equal(within(10, lambda: read_image(remote, reader, 0)), stored)
    assert server.starts(index.shards[0]) == [0, int(remote.offset[0]), 0]


def test_an_image_damaged_in_the_store_is_a_bad_sample(remote, storage, server):
    reader = open_reader(remote, 3, storage)
    shard, offset, size, checksum = place(remote, 0)
    with pytest.raises(BadSample, match="checksum differs") as caught:
        within(10, lambda: reader.image(shard, offset, size, checksum ^ 1))
    assert caught.value.kind == "checksum"
    assert server.starts("seen-000000.tar") == [0, offset]
    path = reader.cache.folder
    assert len(list(path.glob("*.shard"))) == 1


def bytes_held_open(folder: Path) -> int:
    """Bytes of the open files that lie or lay in a folder."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            total += os.stat(link).st_size if str(folder) in os.readlink(link) else 0
    return total


def test_evicted_shards_do_not_keep_their_space(remote, tmp_path):
    files = open_reader(remote, 3).files
    limit = max(file.size for file in files if not isinstance(file, str))
    reader = Reader(files, 3, ShardCache(tmp_path / "cache", limit, Retry(1, 0.01)))
    for sample in np.unique(remote.shard, return_index=True)[1].tolist():
        within(10, lambda sample=sample: reader.image(*place(remote, sample)))
        assert 0 < bytes_held_open(tmp_path) <= limit


def test_a_cache_that_is_too_small_for_the_order_is_refused(index, remote):
    entries = [{**entry, "bytes": 300 * 2**20} for entry in remote.metadata["shards"]]
    large = replace(remote, metadata={**remote.metadata, "shards": entries})
    small = StorageConfig(cache_mebibytes=500)
    with pytest.raises(UsageError, match=r"2 remote shards .*600 MiB.*locality=window.*=600"):
        check_storage(large, "train", DataConfig(storage=small))
    with pytest.raises(UsageError, match="two windows of shards, which take 600 MiB"):
        check_storage(large, "train", DataConfig(storage=small, locality="window"))
    check_storage(large, "test", DataConfig(storage=small, locality="window"))
    check_storage(large, "train", DataConfig(storage=StorageConfig(cache_mebibytes=600)))
    check_storage(index, "train", DataConfig(storage=StorageConfig(cache_mebibytes=1)))
