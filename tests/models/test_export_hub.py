"""Pushing an export with the real client, to a server on the loopback that speaks the hub's API."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dist_dml.errors import RunError, UsageError
from dist_dml.models.export_hub import check_hub, push_to_hub

TOKEN = "hf_of-this-test-alone"


class Hub(ThreadingHTTPServer):
    """What the hub answers to `create_repo` and `upload_folder`, for files below 10 MB."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endpoints)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, object]] = {}
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []


class Endpoints(BaseHTTPRequestHandler):
    """POST alone; everything else is not found."""

    server: Hub

    def do_GET(self) -> None:
        self.answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in self.server.repositories else 200
            self.server.repositories.setdefault(name, asked)
            return self.answer(status, {"url": f"{self.server.url}/{name}", "name": name})
        if path == "/api/models/ann/shoes/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if path == "/api/models/ann/shoes/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    assert value["encoding"] == "base64"
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "header":
                    self.server.messages.append(value["summary"])
            url = f"{self.server.url}/ann/shoes/commit/{'a' * 40}"
            return self.answer(200, {"success": True, "commitUrl": url, "commitOid": "a" * 40})
        return self.answer(404, {"error": f"not found: {path}"})

    def answer(self, status: int, content: dict[str, object]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# shoes\n")
    (tmp_path / "model.onnx").write_bytes(bytes(range(256)) * 40)
    return tmp_path


def test_every_file_arrives_whole_in_one_commit(hub: Hub, folder: Path, capfd) -> None:
    page = push_to_hub(folder, "ann/shoes", private=False, message="demo, step-9")
    assert page == f"{hub.url}/ann/shoes/commit/{'a' * 40}"
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert hub.messages == ["demo, step-9"]
    assert "private" not in hub.repositories["ann/shoes"].values()
    # To a repository that is there already, too.
    push_to_hub(folder, "ann/shoes", private=False, message="again")
    assert hub.messages == ["demo, step-9", "again"]
    out, err = capfd.readouterr()
    assert TOKEN not in out + err


def test_a_private_repository_is_made_private(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, "ann/shoes", private=True, message="x")
    asked = hub.repositories["ann/shoes"]
    assert asked.get("visibility") == "private" or asked.get("private") is True


def test_a_refused_token_is_one_line_that_does_not_repeat_it(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another-secret")
    with pytest.raises(UsageError, match="the hub refuses HF_TOKEN for ann/shoes") as refused:
        push_to_hub(folder, "ann/shoes", private=False, message="x")
    assert "hf_another-secret" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert hub.files == {}


def test_without_a_server_the_error_says_that_the_export_is_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(RunError, match=r"hub at http://127\.0\.0\.1:9 did not take .* complete"):
        push_to_hub(folder, "ann/shoes", private=False, message="x")


@pytest.mark.parametrize("name", ["shoes", "ann/", "/shoes", "ann/shoes/x", "ann/..", "a b/c", ""])
def test_a_name_that_is_not_owner_and_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected OWNER/NAME"):
        check_hub(name)


def test_a_push_without_a_token_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UsageError, match="HF_TOKEN is not set"):
        check_hub("ann/shoes")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_hub("ann/shoes")
