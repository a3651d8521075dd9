"""Passwords and signatures of shards reach the server, and neither a file nor a message."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from shard_server import ShardServer, serving, within

from dist_dml import credentials
from dist_dml.cli import main
from dist_dml.data import shard_files
from dist_dml.data.faults import StorageFault
from dist_dml.data.index import Index, load_index
from dist_dml.data.index_command import build_remote_index
from dist_dml.data.opening import open_index
from dist_dml.data.reader import open_reader, read_image
from dist_dml.data.remote import list_remote, open_remote, stat_remote
from dist_dml.data.remote_client import RemoteFile
from dist_dml.data.retry import Retry
from dist_dml.data.shard_cache import ShardCache
from dist_dml.data_config import DataConfig, StorageConfig
from dist_dml.errors import RunError, UsageError

SECRET = "hunter2-correct-horse"
QUICK = Retry(2, 0.005)
BASIC = "Basic " + base64.b64encode(f"ann:{SECRET}".encode()).decode()


@pytest.fixture
def server(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    """The shards behind a password, which the environment has."""
    monkeypatch.setattr(credentials, "_shown_as", {})
    monkeypatch.setenv("SHARD_PW", SECRET)

    def quick() -> StorageConfig:
        return StorageConfig(retries=2, retry_seconds=0.01)

    monkeypatch.setattr(shard_files, "StorageConfig", quick)
    with serving() as state:
        for path in shard_folder.glob("*.tar"):
            state.files[f"set/{path.name}"] = path.read_bytes()
        state.authorization = BASIC
        yield state


def with_user(server: ShardServer) -> str:
    return server.url.replace("//", "//ann:${SHARD_PW}@")


def names_of(server: ShardServer) -> list[str]:
    return sorted(name.removeprefix("set/") for name in server.files)


def check_no_secret(folder: Path, *texts: str) -> None:
    """No file below `folder`, none of their names, and no text has the secret in any spelling."""
    encoded = BASIC.removeprefix("Basic ")
    for text in texts:
        assert SECRET not in text
        assert encoded not in text
    for path in folder.rglob("*"):
        assert SECRET not in str(path)
        if path.is_file():
            content = path.read_bytes()
            assert SECRET.encode() not in content, path
            assert encoded.encode() not in content, path


@pytest.mark.parametrize("pattern", ["set/*.tar", "set", "set/"])
def test_listed_files_keep_the_reference_and_the_password_reaches_the_server(server, pattern):
    found = within(10, lambda: list_remote(f"{with_user(server)}/{pattern}", QUICK))
    urls = [file.url for file in found]
    assert urls == [f"{with_user(server)}/set/{name}" for name in names_of(server)]
    assert stat_remote(urls[0], QUICK).size == len(server.files[f"set/{names_of(server)[0]}"])


def test_a_folder_whose_variable_hides_a_query_is_refused(server, monkeypatch):
    monkeypatch.setenv("FOLDER", "set?x=1")
    with pytest.raises(UsageError, match="write these yourself"):
        list_remote(f"{with_user(server)}/${{FOLDER}}/*.tar", QUICK)


def test_an_index_of_protected_shards_holds_no_secret(server, tmp_path, capsys, index: Index):
    server.faults[f"set/{names_of(server)[0]}"].append(503)
    command = ["index", "--remote", f"{with_user(server)}/set/*.tar", "--out", str(tmp_path / "a")]
    assert main(command) == 0
    written = capsys.readouterr()
    check_no_secret(tmp_path, written.out, written.err)
    assert "HTTP 503" in written.err
    far = load_index(tmp_path / "a")
    assert far.fingerprint == index.fingerprint
    assert far.shards[0] == f"{with_user(server)}/set/{names_of(server)[0]}"


def test_a_query_token_reaches_the_server_with_each_file(server, tmp_path, monkeypatch):
    server.authorization, server.query = "", f"v=1&token={SECRET}"
    names = "{" + "000000..000000}"
    out = tmp_path / "a"
    url = f"{server.url}/set/train-{names}.tar?v=1&token=${{SHARD_PW}}"
    far = build_remote_index(url, out, processes=1)
    reader = open_reader(far, 3, StorageConfig(cache=str(tmp_path / "cache")))
    assert read_image(far, reader, 0).ndim == 3
    check_no_secret(tmp_path)


def test_images_are_read_and_the_cache_has_no_secret(server, tmp_path, index: Index):
    far = build_remote_index(f"{with_user(server)}/set/*.tar", tmp_path / "a", processes=1)
    storage = StorageConfig(cache=str(tmp_path / "cache"), retries=1, retry_seconds=0.01)
    reader, near = open_reader(far, 3, storage), open_reader(index, 3)
    for sample in range(len(index)):
        assert np.array_equal(read_image(far, reader, sample), read_image(index, near, sample))
    check_no_secret(tmp_path)


def test_a_renewed_password_finds_the_cached_shard_and_another_host_does_not(
    server, tmp_path, monkeypatch
):
    cache = ShardCache(tmp_path, 2**20, QUICK)
    file = RemoteFile("https://ann:${SHARD_PW}@${SHARD_HOST}/a.tar", 10, "tag")
    monkeypatch.setenv("SHARD_HOST", "one.example")
    before = cache.path(file)
    monkeypatch.setenv("SHARD_PW", "another-password")
    assert cache.path(file) == before
    monkeypatch.setenv("SHARD_HOST", "two.example")
    assert cache.path(file) != before


@pytest.mark.parametrize("status", [401, 403, 404, 503])
def test_refusals_and_faults_do_not_repeat_the_password(server, tmp_path, capsys, status):
    far = build_remote_index(f"{with_user(server)}/set/*.tar", tmp_path / "a", processes=1)
    for name in server.files:
        server.always[name] = status
    storage = StorageConfig(cache=str(tmp_path / "cache"), retries=1, retry_seconds=0.01)
    messages = []
    for call in (
        lambda: stat_remote(far.shards[0], QUICK),
        lambda: open_remote(far.shards[0], QUICK),
        lambda: list_remote(far.shards[0], QUICK),
        lambda: read_image(far, open_reader(far, 3, storage), 0),
        lambda: build_remote_index(far.shards[0], tmp_path / "b", processes=1),
    ):
        with pytest.raises((StorageFault, RunError)) as caught:
            call()
        messages.append(str(caught.value))
    assert all("/set/" in message for message in messages)
    check_no_secret(tmp_path, *messages, capsys.readouterr().err)


def test_a_wrong_password_is_said_without_repeating_it(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SHARD_PW", "wrong-password")
    with pytest.raises(RunError, match="HTTP 401") as caught:
        build_remote_index(f"{with_user(server)}/set/*.tar", tmp_path, processes=1)
    assert "wrong-password" not in str(caught.value)


def test_a_variable_that_is_not_set_is_named(server, tmp_path, monkeypatch):
    far = build_remote_index(f"{with_user(server)}/set/*.tar", tmp_path / "a", processes=1)
    monkeypatch.delenv("SHARD_PW")
    with pytest.raises(UsageError, match="SHARD_PW, which is not set"):
        open_reader(far, 3)


@pytest.mark.parametrize(
    "url",
    [
        f"http://ann:{SECRET}@127.0.0.1:9/*.tar",
        f"http://127.0.0.1:9/a.tar?token={SECRET}",
        f"s3://bucket/a.tar?X-Amz-Signature={SECRET}",
    ],
)
def test_a_url_with_a_secret_in_it_is_not_indexed(tmp_path, url, capsys):
    assert main(["index", "--remote", url, "--out", str(tmp_path / "a")]) == 2
    written = capsys.readouterr()
    assert "${NAME}" in written.err
    check_no_secret(tmp_path, written.out, written.err)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("url", ["${SHARDS}/a.tar", "http://127.0.0.1:9/${NAME}.tar"])
def test_scheme_and_file_name_are_written_out(tmp_path, url):
    with pytest.raises(UsageError, match="write scheme and file name yourself"):
        build_remote_index(url, tmp_path)


def test_an_index_of_an_earlier_version_with_a_secret_is_refused(server, tmp_path):
    build_remote_index(f"{with_user(server)}/set/*.tar", tmp_path, processes=1)
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["shards"][0]["name"] = f"http://ann:{SECRET}@127.0.0.1/a.tar"
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"dataset\.json: the name of a shard holds") as caught:
        load_index(tmp_path)
    assert SECRET not in str(caught.value)


def test_the_folder_of_a_data_set_may_come_from_the_environment(index, monkeypatch):
    monkeypatch.setattr(credentials, "_shown_as", {})  # Else later tests' paths are hidden.
    monkeypatch.setenv("DATA_ROOT", str(index.folder.parent))
    config = DataConfig(path=f"${{DATA_ROOT}}/{index.folder.name}", split="train")
    assert open_index(config).fingerprint == index.fingerprint
    monkeypatch.delenv("DATA_ROOT")
    with pytest.raises(UsageError, match=r"data\.path=.* DATA_ROOT, which is not set"):
        open_index(config)


def test_a_manifest_may_have_signed_urls_and_its_data_set_does_not_repeat_them(
    server, tmp_path, capsys
):
    from dist_dml.data.pack.manifest import pack_manifest
    from dist_dml.data.pack.url_images import Fetching
    from dist_dml.data.tar_members import ForwardReader, walk_members

    server.authorization = ""
    import cv2

    png = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
    for number in range(4):
        server.files[f"{number}.png"] = png
    rows = [f"{server.url}/{n}.png?X-Amz-Signature={SECRET},c,train" for n in range(5)]
    (tmp_path / "list.csv").write_text("\n".join(["url,label,split", *rows, ""]))
    fetching = Fetching(retry=Retry(0, 0.01))
    out = tmp_path / "out"
    pack_manifest(
        tmp_path / "list.csv", out, processes=1, shard_samples=8, max_failed=0.5, fetching=fetching
    )
    written = capsys.readouterr()
    check_no_secret(out, written.out, written.err)
    assert "4.png?X-Amz-Signature=***" in next((out / "failed").glob("*.csv")).read_text()
    tar = next(out.glob("*.tar"))
    with tar.open("rb") as stream:
        members = [m.name for m in walk_members(ForwardReader(stream, seeks=True))]
    assert len([name for name in members if name.endswith(".png")]) == 4
