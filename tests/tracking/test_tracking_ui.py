"""The UI of the runs: for this machine alone, and only under the names that it was told."""

from __future__ import annotations

import http.client
import itertools
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from dist_dml.errors import UsageError
from dist_dml.tracking.ui_command import ui_command


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    # MLflow makes its tables in an empty database.
    with closing(sqlite3.connect(folder / "mlflow.db")):
        pass
    (folder / "mlflow.db").touch()
    return folder


def options(command: list[str]) -> dict[str, str]:
    return {name: value for name, value in itertools.pairwise(command) if "--" in name}


def test_hosts_and_origins_are_always_named(root: Path) -> None:
    port = free_port()
    given = options(ui_command(root, port))
    assert given["--host"] == "127.0.0.1"
    assert set(given["--allowed-hosts"].split(",")) == {
        *("localhost", "localhost:*", "127.0.0.1", "127.0.0.1:*", f"[::1]:{port}"),
    }
    assert all("://" in origin for origin in given["--cors-allowed-origins"].split(","))
    named = options(ui_command(root, port, "0.0.0.0", ["mlflow.example.org"]))
    assert named["--host"] == "0.0.0.0"
    assert f"mlflow.example.org:{port}" in named["--allowed-hosts"].split(",")
    assert "https://mlflow.example.org" in named["--cors-allowed-origins"].split(",")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.2", "mlflow.example.org"])
def test_another_address_than_the_loopback_needs_the_names_that_may_ask(root, host) -> None:
    with pytest.raises(UsageError, match=rf"--host={host} .* --allowed-hosts"):
        ui_command(root, free_port(), host)


@pytest.mark.parametrize("name", ["*", "*:*", "*.*"])
def test_a_pattern_that_allows_any_name_is_refused(root, name) -> None:
    with pytest.raises(UsageError, match="allows any name"):
        ui_command(root, free_port(), "0.0.0.0", ["mlflow.example.org", name])


def test_a_port_that_is_taken_is_refused(root) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 cannot be used"):
            ui_command(root, port)


@pytest.fixture(scope="module")
def ui(root: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    port = free_port()
    # What the environment says of MLflow's checks does not count.
    environment = os.environ | {
        "MLFLOW_SERVER_ALLOWED_HOSTS": "*",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": "*",
        "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "true",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_dml.cli", "ui", "--root", str(root), "--port", str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 90
    try:
        while status(port, "127.0.0.1") != 200:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.3)
        yield process, port
    finally:
        # It ends the server, which leads a session of its own.
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def status(port: int, host: str, method: str = "GET", origin: str = "") -> int:
    """The status of the answer to a request under a name; 0 while nobody answers."""
    headers = {"Host": host, "Content-Type": "application/json"}
    headers |= {"Origin": origin} if origin else {}
    path = "/" if method == "GET" else "/api/2.0/mlflow/experiments/search"
    body = '{"max_results": 1}' if method == "POST" else None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


@pytest.mark.slow
def test_a_request_under_a_foreign_name_gets_nothing(ui) -> None:
    _, port = ui
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:8080", f"[::1]:{port}"):
        assert status(port, host) == 200, host
    # MLflow's own default lets private addresses in; the environment asked for all.
    for host in ("evil.example", f"evil.example:{port}", "192.168.0.7", "localhost.evil.example"):
        assert status(port, host) == 403, host


@pytest.mark.slow
def test_a_page_of_another_origin_cannot_change_anything(ui) -> None:
    _, port = ui
    host = f"127.0.0.1:{port}"
    assert status(port, host, "POST") == 200
    assert status(port, host, "POST", f"http://127.0.0.1:{port}") == 200
    assert status(port, host, "POST", "https://evil.example") == 403


@pytest.mark.slow
def test_the_ui_listens_on_the_loopback_alone(ui) -> None:
    process, port = ui
    listening = [
        connection.laddr
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {(address.ip, address.port) for address in listening} == {("127.0.0.1", port)}
