"""Cached shards are whole, bounded, fetched once, never stale, and nobody waits for the dead."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_server import serving, within

from dist_dml.data import shard_cache
from dist_dml.data.faults import StorageFault
from dist_dml.data.prefetch import Prefetcher
from dist_dml.data.remote import RemoteFile, stat_remote
from dist_dml.data.retry import Interrupted, Retry
from dist_dml.data.shard_cache import ShardCache
from dist_dml.data_config import StorageConfig
from dist_dml.errors import UsageError

QUICK = Retry(3, 0.005)
SIZE = 100_000


@pytest.fixture
def server():
    with serving() as state:
        for number in range(8):
            state.files[f"{number}.tar"] = np.random.default_rng(number).bytes(SIZE)
        yield state


@pytest.fixture
def files(server) -> list[RemoteFile]:
    found = [stat_remote(f"{server.url}/{number}.tar", QUICK) for number in range(8)]
    server.requests.clear()
    return found


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 3 * SIZE, QUICK)


def content(cache: ShardCache, file: RemoteFile) -> bytes:
    def read() -> bytes:
        descriptor = cache.open(file)
        try:
            return os.pread(descriptor, 2 * file.size, 0)
        finally:
            os.close(descriptor)

    return within(15, read)  # type: ignore[return-value]


def held(cache: ShardCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def part_of(cache: ShardCache, file: RemoteFile) -> Path:
    return cache.path(file).with_suffix(".part")


def test_a_shard_is_fetched_once_and_then_read_from_the_disk(server, files, cache):
    for _ in range(3):
        assert content(cache, files[0]) == server.files["0.tar"]
    assert server.requests == [("0.tar", 0)]
    assert {path.suffix for path in cache.folder.iterdir()} == {".shard", ".lock"}


def test_a_changed_object_never_meets_an_old_file(server, files, cache):
    content(cache, files[0])
    server.files["0.tar"] = new = bytes(SIZE)
    now = stat_remote(files[0].url, QUICK)
    assert content(cache, now) == new
    cache.drop(files[0])
    with pytest.raises(StorageFault, match="changed"):
        content(cache, files[0])


def test_the_least_recently_used_leaves_and_the_bound_holds(server, files, cache):
    for number in (0, 1, 2, 0, 3, 0, 4):
        content(cache, files[number])
        assert held(cache) <= cache.limit_bytes
        time.sleep(0.01)
    here = [number for number in range(8) if cache.path(files[number]).exists()]
    assert here == [0, 3, 4]
    assert len(server.starts("0.tar")) == 1


def test_an_open_shard_can_be_read_after_it_left(server, files, cache):
    descriptor = cache.open(files[0])
    for number in (1, 2, 3):
        content(cache, files[number])
    assert not cache.path(files[0]).exists()
    assert os.pread(descriptor, SIZE, 0) == server.files["0.tar"]
    os.close(descriptor)


def test_threads_that_want_the_same_shards_fetch_each_once(server, files, cache):
    server.faults["0.tar"].append(("stall", 0.3))
    wanted = [server.files[f"{number}.tar"] for number in range(3)]
    results: list[list[bytes]] = []

    def work() -> None:
        results.append([content(cache, files[number]) for number in range(3)])

    threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [wanted] * 6
    assert sorted(server.requests) == [("0.tar", 0), ("1.tar", 0), ("2.tar", 0)]


def test_fetches_at_the_same_time_keep_the_bound(files, cache, server):
    for number in range(8):
        server.always[f"{number}.tar"] = ("stall", 0.05)
    largest = 0
    threads = [
        threading.Thread(target=content, args=(cache, file), daemon=True) for file in files * 2
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        # Nothing is begun or evicted meanwhile; a file that gets its final name is passed over.
        with suppress(FileNotFoundError), cache._room():
            largest = max(largest, held(cache))
        time.sleep(0.002)
    assert SIZE < largest <= cache.limit_bytes


def test_what_a_dead_process_left_is_overwritten_or_removed(server, files, cache):
    content(cache, files[0])
    for number in (1, 2):
        part_of(cache, files[number]).write_bytes(b"half" * 1000)
    assert content(cache, files[1]) == server.files["1.tar"]
    assert list(cache.folder.glob("*.part")) == []


def test_a_living_fetcher_is_waited_for_and_a_dead_one_replaced(server, files, cache):
    cache.folder.mkdir()
    part = os.open(part_of(cache, files[0]), os.O_RDWR | os.O_CREAT)
    os.write(part, b"half")
    fcntl.flock(part, fcntl.LOCK_EX)
    results: list[bytes] = []
    waiting = threading.Thread(target=lambda: results.append(content(cache, files[0])))
    waiting.start()
    assert content(cache, files[1]) == server.files["1.tar"]
    assert part_of(cache, files[0]).read_bytes() == b"half"
    assert server.starts("0.tar") == []
    os.close(part)
    waiting.join(10)
    assert results == [server.files["0.tar"]]


def test_those_who_waited_for_one_that_failed_try_once_and_later_ones_as_often_as_ever(
    server, files, cache
):
    server.always["0.tar"] = 503
    patient = replace(cache, retry=Retry(3, 0.1))

    def failure() -> str:
        with pytest.raises(StorageFault) as caught:
            patient.open(files[0])
        return str(caught.value)

    with ThreadPoolExecutor(5) as pool:
        reasons = list(within(30, lambda: list(pool.map(lambda _: failure(), range(5)))))
    assert sorted("failed 4 times" in reason for reason in reasons) == [False] * 4 + [True]
    assert sum("another process of this machine has tried for" in reason for reason in reasons) == 4
    assert len(server.requests) == 4 + 4
    assert "failed 4 times" in failure()
    del server.always["0.tar"]
    server.faults["0.tar"].extend([503] * 3)
    assert content(patient, files[0]) == server.files["0.tar"]
    assert not list(cache.folder.glob("*.failed"))


def test_a_fetcher_that_stalls_is_not_waited_for_for_ever(files, cache, monkeypatch):
    monkeypatch.setattr(shard_cache, "STALL_SECONDS", 0.1)
    cache.folder.mkdir()
    part = os.open(part_of(cache, files[0]), os.O_RDWR | os.O_CREAT)
    fcntl.flock(part, fcntl.LOCK_EX)
    with pytest.raises(StorageFault, match=r"another process fetches it .* 1 s"):
        content(cache, files[0])
    os.close(part)


def test_a_file_that_is_too_short_is_fetched_again(server, files, cache):
    content(cache, files[0])
    cache.path(files[0]).write_bytes(b"torn")
    assert content(cache, files[0]) == server.files["0.tar"]


def test_a_failed_fetch_leaves_an_empty_note_and_nothing_else(server, files, cache):
    server.always["0.tar"] = 503
    with pytest.raises(StorageFault, match="failed 4 times"):
        content(cache, files[0])
    assert {path.suffix for path in cache.folder.iterdir()} == {".failed", ".lock"}
    assert held(cache) == 0


def test_limits_and_folders_that_cannot_work_are_refused(files, tmp_path):
    with pytest.raises(UsageError, match="cache_mebibytes"):
        content(ShardCache(tmp_path / "a", SIZE - 1, QUICK), files[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"data\.storage\.cache=.*file cannot be used"):
        content(ShardCache(tmp_path / "file", SIZE, QUICK), files[0])
    cache = ShardCache.of_config(StorageConfig(cache_mebibytes=100))
    cache.check_limit(100 * 2**20)
    with pytest.raises(UsageError, match="take 101 MiB; set it to 101 or more"):
        cache.check_limit(100 * 2**20 + 1)
    assert cache.folder.name == "dist_dml"


def test_a_folder_of_another_user_in_the_common_place_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = ShardCache.of_config(StorageConfig())
    cache.folder.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: cache.folder.stat().st_uid + 1)
    with pytest.raises(UsageError, match="belongs to another user"):
        content(cache, files[0])


def test_shards_are_fetched_ahead_in_order_and_only_those_named(server, files, cache):
    ahead = Prefetcher(cache, ["local.tar", *files], num_threads=1)
    ahead.follow([0, 3, 2, 3])
    ahead.follow(np.array([0, 3, 2]))
    _until(lambda: cache.path(files[1]).exists() and cache.path(files[2]).exists())
    ahead.close()
    assert server.requests == [("2.tar", 0), ("1.tar", 0)]
    assert ahead.failures == {}


def test_a_shard_that_cannot_be_fetched_ahead_is_left_to_its_reader(server, files, cache):
    server.always["0.tar"] = 503
    ahead = Prefetcher(cache, files)
    ahead.follow([0, 1])
    _until(lambda: 0 in ahead.failures and cache.path(files[1]).exists())
    with pytest.raises(StorageFault, match="HTTP 503"):
        content(cache, files[0])
    del server.always["0.tar"]
    assert content(cache, files[0]) == server.files["0.tar"]
    ahead.close()


def test_closing_stops_threads_in_the_middle_of_a_fetch_and_of_a_pause(server, files, cache):
    server.always["0.tar"] = ("stall", 8)
    server.always["1.tar"] = 503
    slow = ShardCache(cache.folder, cache.limit_bytes, Retry(3, 60.0))
    before = threading.active_count()
    ahead = Prefetcher(slow, files)
    ahead.follow([0, 1, 2])
    _until(lambda: len(server.requests) == 3 and cache.path(files[2]).exists())
    assert sum(thread.name.startswith("fetch-") for thread in threading.enumerate()) == 4
    started = time.monotonic()
    within(10, ahead.close)
    assert time.monotonic() - started < 5
    assert not any(thread.name.startswith("fetch-") for thread in threading.enumerate())
    assert threading.active_count() <= before + 3  # The server's and fsspec's.
    assert list(cache.folder.glob("*.part")) == []


def test_a_stopped_fetch_says_so(server, files, cache):
    server.always["0.tar"] = ("stall", 8)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Interrupted):
        within(5, lambda: cache.fetch(files[0], stop))


def _until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not happen within 10 s"
        time.sleep(0.01)
