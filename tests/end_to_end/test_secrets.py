"""Real runs with passwords in their environment: afterwards they stand nowhere else."""

from __future__ import annotations

import base64
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest
from launching import BIN, ROOT, Launcher
from shard_server import serving

pytestmark = pytest.mark.slow

# With a letter that a URL writes in another way, and JSON as well.
SECRET = 'qz9hunter/w7"horse'
IN_URL = quote(SECRET, safe="")
BASIC = base64.b64encode(f"ann:{SECRET}".encode()).decode()
SPELLINGS = tuple(
    text.encode() for text in (SECRET, IN_URL, IN_URL.lower(), BASIC, "qz9hunter", "horse")
)


def check_no_secret(folder: Path, *texts: str) -> int:
    """No file below `folder` has the secret in any spelling, nor any text. Returns the files."""
    for text in texts:
        for spelling in SPELLINGS:
            assert spelling.decode() not in text, text
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        assert not any(spelling in content for spelling in SPELLINGS), path
    return len(files)


@dataclass
class Trouble:
    """A tracking server that never does what it should, and says again what it was told.

    Attributes:
        port: that it listens on.
        told: `Authorization` of each request.
        command_lines: of every process that named the run while a request came.
    """

    port: int = 0
    told: list[str] = field(default_factory=list)
    command_lines: list[str] = field(default_factory=list)


@contextmanager
def misbehaving(root: Path) -> Iterator[Trouble]:
    trouble = Trouble()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

        def do_GET(self) -> None:
            told = self.headers.get("Authorization", "")
            trouble.told.append(told)
            for process in psutil.process_iter(["cmdline"]):
                line = " ".join(process.info["cmdline"] or [])
                if str(root) in line:
                    trouble.command_lines.append(line)
            kind = len(trouble.told) % 4
            if kind == 0:
                self.connection.close()
                return
            known = base64.b64decode(told.removeprefix("Basic ")).decode()
            body = f"you are {told} alias {known} http://{known}@127.0.0.1/".encode()
            self.send_response((500, 401, 302, 404)[kind])
            if kind == 2:
                self.send_header("Location", f"http://{known}@127.0.0.1:{trouble.port}/other")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    trouble.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield trouble
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_the_password_of_a_tracking_server_is_in_no_file_output_or_command_line(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with misbehaving(launcher.root) as server:
        monkeypatch.setenv("TRACKING_PW", IN_URL)
        monkeypatch.setenv("TRACKING_URI", f"http://ann:{IN_URL}@127.0.0.1:{server.port}")
        uri = f"http://ann:${{TRACKING_PW}}@127.0.0.1:{server.port}"
        arguments = ["run.name=a", "training.max_steps=6", "checkpoint.every_steps=3"]
        arguments += ["tracking.mlflow=true", f"tracking.mlflow_uri={uri}"]
        done = launcher.run("python", 1, *arguments, timeout_seconds=240)
        folder = launcher.root / "a"
        synced = [
            subprocess.run(
                [str(BIN / "dist-dml"), "track", "sync", str(folder), *options],
                cwd=ROOT,
                env=os.environ | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"},
                capture_output=True,
                text=True,
                timeout=240,
            )
            for options in ([], ["--uri", "${TRACKING_URI}"])
        ]
    assert done.exit_code == 0, done.output
    assert "dist-dml track sync" in done.output, "the run said that MLflow lacks records"
    assert [one.returncode for one in synced] == [1, 1]
    assert uri in synced[0].stderr
    assert "${TRACKING_URI}" in synced[1].stderr
    # The password did come out of the environment, where it was needed.
    assert f"Basic {BASIC}" in server.told
    assert any("mirror_process" in line for line in server.command_lines)
    # What the server said again was noted, and hidden.
    noted = (folder / "mlflow.log").read_text() + synced[0].stderr + synced[1].stderr
    assert "***" in noted or "ann:${TRACKING_PW}" in noted, noted
    assert uri in (folder / "config.yaml").read_text()
    assert (folder / "checkpoints").is_dir()
    texts = [done.output, *server.command_lines]
    texts += [text for one in synced for text in (one.stdout, one.stderr)]
    assert check_no_secret(launcher.root, *texts) > 8


def test_a_password_in_the_configuration_ends_the_run_before_it_is_written(
    launcher: Launcher, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"tracking: {{mlflow_uri: 'http://ann:{IN_URL}@127.0.0.1:9'}}\n")
    done = launcher.run("python", 1, "run.name=a", "--config", str(file))
    assert done.exit_code == 2
    assert len(done.error_lines) == 1
    assert "tracking.mlflow_uri holds a password" in done.error_lines[0]
    file.unlink()
    check_no_secret(tmp_path, done.output)


@pytest.mark.parametrize("how", ["password", "query"])
def test_secrets_of_shards_are_in_no_file_or_output_of_a_training(
    launcher: Launcher, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("SHARD_PW", IN_URL)
    with serving() as server:
        for path in data.glob("*.tar"):
            server.files[path.name] = path.read_bytes()
        if how == "password":
            server.authorization = f"Basic {BASIC}"
            urls = server.url.replace("//", "//ann:${SHARD_PW}@") + "/*.tar"
        else:
            server.query = f"v=1&sig={IN_URL}"
            count = len(list(data.glob("train-*.tar")))
            numbers = f"{{000000..{count - 1:06d}}}"
            urls = f"{server.url}/train-{numbers}.tar?v=1&sig=${{SHARD_PW}}"
        first = sorted(server.files)[0]
        server.faults[first].extend([503])
        far = tmp_path / "far"
        indexed = subprocess.run(
            [str(BIN / "dist-dml"), "index", "--remote", urls, "--out", str(far)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert indexed.returncode == 0, indexed.stderr
        arguments = [f"data.path={far}", "data.locality=window", "data.loader_processes=1"]
        arguments += ["training.max_steps=4", "evaluation.protocols=[{name: seen, query: train}]"]
        arguments += [f"data.storage.cache={tmp_path / 'cache'}", "checkpoint.best_metric="]
        arguments += ["data.storage.retries=1", "data.storage.retry_seconds=0.05"]
        trained = launcher.run("python", 1, "run.name=a", *arguments, timeout_seconds=240)
        # Another time the password is wrong: the run ends and says so.
        monkeypatch.setenv("SHARD_PW", "wrong" + IN_URL)
        arguments += [f"data.storage.cache={tmp_path / 'cache2'}"]
        refused = launcher.run("python", 1, "run.name=b", *arguments, timeout_seconds=240)
    assert trained.exit_code == 0, trained.output
    assert refused.exit_code == 1
    assert ("HTTP 401" if how == "password" else "HTTP 403") in refused.error_lines[0]
    texts = (indexed.stdout, indexed.stderr, trained.output, refused.output)
    assert check_no_secret(tmp_path, *texts) > 10
