"""Files come whole from a store on a bad day, or the reason is said; nothing hangs or changes."""

from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
from shard_server import ShardServer, serving, within

from dist_dml.data import remote_client
from dist_dml.data.faults import StorageFault
from dist_dml.data.remote import (
    RemoteFile,
    check_clients,
    fetch_remote,
    is_remote,
    list_remote,
    open_remote,
    read_range,
    stat_remote,
)
from dist_dml.data.retry import Retry
from dist_dml.errors import UsageError

QUICK = Retry(4, 0.005)
CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def server():
    with serving() as state:
        state.files["a.tar"] = CONTENT
        yield state


def read(url: str) -> bytes:
    def whole() -> bytes:
        with open_remote(url, QUICK) as stream:
            return stream.read()

    return within(10, whole)  # type: ignore[return-value]


def test_urls_are_remote_and_paths_are_not():
    assert all(is_remote(f"{s}://x/y.tar") for s in ("s3", "gs", "http", "https"))
    assert not any(is_remote(p) for p in ("/x/y.tar", "y.tar", "file:///x/y.tar", "c:/y.tar"))


def test_size_and_tag_come_in_one_request(server):
    file = stat_remote(f"{server.url}/a.tar", QUICK)
    assert (file.size, len(file.tag)) == (len(CONTENT), 32)
    assert server.requests == [("a.tar", 0)]


def test_a_store_that_is_unavailable_for_a_while_is_waited_for(server, capsys):
    server.faults["a.tar"].extend([503, 429, "drop", 500])
    assert read(f"{server.url}/a.tar") == CONTENT
    assert "HTTP 503 (Service Unavailable); trying again" in capsys.readouterr().err


def test_a_broken_answer_goes_on_where_it_broke_off(server):
    server.files["long.tar"] = long = np.random.default_rng(1).bytes(12_000_000)
    faults = [None, ("cut", 6_000_000), 503, ("cut", 4_000_000), "drop", ("cut", 0)]
    server.faults["long.tar"].extend(faults)
    assert read(f"{server.url}/long.tar") == long
    starts = server.starts("long.tar")[1:]
    assert len(starts) == len(faults)
    assert starts[0] == 0
    assert 5_000_000 < starts[1] == starts[2] <= 6_000_000
    assert starts[2] + 3_000_000 < starts[3] == starts[4] == starts[5] <= starts[2] + 4_000_000


def test_a_server_without_ranges_is_read_too_also_after_a_break(server):
    server.ranges = False
    server.faults["a.tar"].extend([None, ("cut", 100_000), ("cut", 120_000)])
    assert read(f"{server.url}/a.tar") == CONTENT
    file = stat_remote(f"{server.url}/a.tar", QUICK)
    assert within(10, lambda: read_range(file, 1000, 50, QUICK)) == CONTENT[1000:1050]


def test_a_store_that_stays_unavailable_ends_in_a_fault(server):
    server.always["a.tar"] = 503
    with pytest.raises(StorageFault, match=r"a\.tar: failed 5 times .* HTTP 503"):
        read(f"{server.url}/a.tar")
    assert len(server.requests) == 5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_asked_for_again(server, status):
    server.always["a.tar"] = status
    with pytest.raises(StorageFault, match=f"HTTP {status}"):
        read(f"{server.url}/a.tar")
    assert len(server.requests) == 1


def test_a_silent_connection_is_given_up(server, monkeypatch):
    monkeypatch.setattr(remote_client, "STALL_SECONDS", 0.3)
    server.faults["a.tar"].append(("stall", 30))
    assert read(f"{server.url}/a.tar") == CONTENT
    monkeypatch.setattr(remote_client, "REQUEST_SECONDS", 0.2)
    server.always["a.tar"] = ("stall", 30)
    with pytest.raises(StorageFault, match="no answer in time"):
        within(10, lambda: stat_remote(f"{server.url}/a.tar", Retry(1, 0.0)))


def test_a_server_that_is_not_there_is_a_fault():
    with serving() as gone:
        url = gone.url
    with pytest.raises(StorageFault, match="failed 5 times"):
        within(10, lambda: stat_remote(f"{url}/a.tar", QUICK))


def test_an_object_that_changes_while_it_is_read_is_refused(server):
    server.faults["a.tar"].extend([None, ("cut", 100_000)])

    def change(name: str) -> None:
        if len(server.requests) == 3:
            server.files[name] = bytes(len(CONTENT))

    server.on_request = change
    with pytest.raises(StorageFault, match=r"changed.*index the data set again"):
        read(f"{server.url}/a.tar")


@pytest.mark.parametrize("other", [{"size": 5}, {"tag": "other"}])
def test_an_object_that_is_not_the_indexed_one_is_not_fetched(server, tmp_path, other):
    now = stat_remote(f"{server.url}/a.tar", QUICK)
    indexed = RemoteFile(now.url, other.get("size", now.size), other.get("tag", now.tag))
    with pytest.raises(StorageFault, match=r"a\.tar changed: .*index the data set again"):
        within(10, lambda: fetch_remote(indexed, tmp_path / "a.tar", QUICK))
    assert list(tmp_path.iterdir()) == []


def test_a_fetched_file_is_whole_or_absent(server, tmp_path):
    file = stat_remote(f"{server.url}/a.tar", QUICK)
    server.faults["a.tar"].extend([("cut", 9), 503])
    within(10, lambda: fetch_remote(file, tmp_path / "a.tar", QUICK))
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    server.always["a.tar"] = ("cut", 0)
    with pytest.raises(StorageFault, match="failed 5 times"):
        within(10, lambda: fetch_remote(file, tmp_path / "b.tar", QUICK))
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_stream_can_be_asked_for_another_place(server):
    with open_remote(f"{server.url}/a.tar", QUICK) as stream:
        assert within(10, lambda: stream.read(10)) == CONTENT[:10]
        stream.seek(200_000)
        assert within(10, lambda: stream.read(10)) == CONTENT[200_000:200_010]
        assert stream.tell() == 200_010
        stream.seek(-5, 2)
        assert within(10, stream.read) == CONTENT[-5:]


@pytest.mark.parametrize("pattern", ["x/t-{00..02}.tar", "x/t-*.tar", "x", "x/"])
def test_shards_are_listed_by_range_star_and_folder(server, pattern):
    for name in ("x/t-01.tar", "x/t-00.tar", "x/t-02.tar", "x/notes.txt", "x/y/t-03.tar"):
        server.files[name] = name.encode()
    server.faults["x/t-01.tar"].append(503)
    found = within(10, lambda: list_remote(f"{server.url}/{pattern}", QUICK))
    names = [file.url.removeprefix(server.url) for file in found]  # type: ignore
    assert names == ["/x/t-00.tar", "/x/t-01.tar", "/x/t-02.tar"]


def test_a_single_file_is_listed_and_what_is_not_there_is_said(server):
    assert [f.size for f in list_remote(f"{server.url}/a.tar", QUICK)] == [len(CONTENT)]
    with pytest.raises(UsageError, match=r"no file b-\*\.tar there"):
        list_remote(f"{server.url}/b-*.tar", QUICK)
    with pytest.raises(UsageError, match="last part"):
        list_remote(f"{server.url}/*/b.tar", QUICK)
    with pytest.raises(UsageError, match="empty or above a million"):
        list_remote(f"{server.url}/{{9..1}}.tar", QUICK)
    with pytest.raises(StorageFault, match="404"):
        list_remote(f"{server.url}/{{1..3}}.tar", QUICK)


def test_passwords_and_signatures_reach_the_server_and_no_message(server, capsys):
    secret = server.url.replace("//", "//me:hunter2@") + "/a.tar?X-Amz-Signature=hunter3"
    server.faults["a.tar"].extend([503])
    assert stat_remote(secret, QUICK).size == len(CONTENT)
    messages = [capsys.readouterr().err]
    server.always["a.tar"] = 403
    for call in (stat_remote, open_remote, list_remote):
        with pytest.raises(StorageFault) as caught:
            call(secret, QUICK)
        messages.append(str(caught.value))
    assert all("/a.tar" in message and "hunter" not in message for message in messages)


def test_an_object_store_is_read_in_blocks_and_asked_before_and_after():
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/bucket/t-0.tar", CONTENT)
    store.pipe("/bucket/t-1.tar", b"x")
    (file, other) = list_remote("memory://bucket/t-*.tar", QUICK)
    assert (file.size, other.size) == (len(CONTENT), 1)
    assert file.tag
    assert read(file.url) == CONTENT
    with open_remote(file.url, QUICK) as stream:
        store.pipe("/bucket/t-0.tar", CONTENT[::-1])
        with pytest.raises(StorageFault, match="changed"):
            stream.read()
    with pytest.raises(StorageFault, match="does not exist"):
        stat_remote("memory://bucket/none.tar", QUICK)
    store.rm("/bucket", recursive=True)


def test_a_missing_client_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UsageError, match=r"s3://.*pip install 'dist_dml\[remote\]'"):
        check_clients(["s3://bucket/a.tar"])
    with pytest.raises(UsageError, match="nonsense"):
        check_clients(["nonsense://bucket/a.tar"])
    with pytest.raises(UsageError, match="chained"):
        check_clients(["simplecache::http://bucket/a.tar"])


def test_a_large_file_is_read_in_bounded_memory(server: ShardServer):
    server.tags = False
    server.files["large.tar"] = bytes(60 * 2**20)

    def whole() -> int:
        with open_remote(f"{server.url}/large.tar", QUICK) as stream:
            return sum(len(block) for block in iter(lambda: stream.read(2**16), b""))

    within(10, lambda: stat_remote(f"{server.url}/large.tar", QUICK))  # Imports and connections.
    tracemalloc.start()
    try:
        assert within(30, whole) == 60 * 2**20
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
