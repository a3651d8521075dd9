"""One cache, several processes: each shard once, the dead in nobody's way, a full disk is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from shard_server import serving, within

from dist_dml.data.remote import RemoteFile, stat_remote
from dist_dml.data.retry import Retry
from dist_dml.data.shard_cache import ShardCache

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


def part_of(cache: ShardCache, file: RemoteFile) -> Path:
    return cache.path(file).with_suffix(".part")


FETCH = """
import os, sys
from pathlib import Path
from dist_dml.data.remote_client import RemoteFile
from dist_dml.data.retry import Retry
from dist_dml.data.shard_cache import ShardCache
folder, limit, *files = sys.argv[1:]
cache = ShardCache(Path(folder), int(limit), Retry(2, 0.1))
files = [RemoteFile(u, int(s), t) for u, s, t in (text.split(",") for text in files)]
"""


def fetching(code: str, cache: ShardCache, *files: RemoteFile) -> subprocess.Popen[str]:
    described = [f"{file.url},{file.size},{file.tag}" for file in files]
    return subprocess.Popen(
        [sys.executable, "-c", FETCH + code, str(cache.folder), str(cache.limit_bytes), *described],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_processes_that_want_the_same_shards_fetch_each_once(server, files, cache):
    for number in range(3):
        server.always[f"{number}.tar"] = ("stall", 0.3)
    code = "for file in files:\n    print(os.pread(cache.open(file), 4, 0).hex())"
    started = [fetching(code, cache, *files[:3]) for _ in range(3)]
    wanted = "".join(server.files[f"{number}.tar"][:4].hex() + "\n" for number in range(3))
    for process in started:
        assert process.communicate(timeout=60) == (wanted, "")
    assert sorted(server.requests) == [("0.tar", 0), ("1.tar", 0), ("2.tar", 0)]


@pytest.mark.slow
def test_a_killed_fetcher_blocks_nobody(server, files, cache):
    server.faults["0.tar"].append(("stall", 30))
    process = fetching("cache.open(files[0])", cache, files[0])
    end = time.monotonic() + 60
    while not (server.requests and part_of(cache, files[0]).exists()):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)
    assert part_of(cache, files[0]).stat().st_size == SIZE
    assert content(cache, files[0]) == server.files["0.tar"]


@pytest.mark.slow
def test_a_program_ends_while_a_fetch_goes_on(server, files, cache):
    server.always["0.tar"] = ("stall", 30)
    code = """
from dist_dml.data.prefetch import Prefetcher
import time
ahead = Prefetcher(cache, files)
ahead.follow([0])
while not list(cache.folder.glob("*.part")): time.sleep(0.05)
print("ends", flush=True)
"""
    process = fetching(code, cache, files[0])
    assert process.stdout is not None
    assert process.stdout.readline() == "ends\n"
    assert process.communicate(timeout=15) == ("", "")
    assert process.returncode == 0


@pytest.mark.slow
def test_a_full_disk_evicts_and_then_says_so(server, files, tmp_path):
    mounted = tmp_path / "disk"
    mounted.mkdir()
    cache = ShardCache(mounted, 10 * SIZE, QUICK)
    code = """
def whole(): return sorted(path.stat().st_size for path in cache.folder.glob("*.shard"))
for file in files[:4]: cache.fetch(file)
print(len(whole()))
keep = [os.open(path, os.O_RDONLY) for path in cache.folder.glob("*.shard")]
try: cache.fetch(files[4])
except Exception as error: print(type(error).__name__, error)
print([path.name for path in cache.folder.glob("*.part")])
"""
    fetch = fetching(code, cache, *files)  # Its arguments; it runs inside the small disk below.
    fetch.kill()
    fetch.communicate()
    assert isinstance(fetch.args, list)
    arguments = [str(argument) for argument in fetch.args]
    small = f'mount -t tmpfs -o size=300k none "{mounted}" && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", small, "sh", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no unshare to make a small disk with")
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this user may not mount a small disk")
    lines = done.stdout.splitlines()
    assert lines[0] == "3", done.stderr
    assert lines[1].startswith("StorageFault data.storage.cache=")
    assert "the disk is full" in lines[1]
    assert "data.storage.cache_mebibytes" in lines[1]
    assert lines[2] == "[]"
