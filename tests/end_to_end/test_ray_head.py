"""The Ray head: on the loopback, behind a token, and gone with all that it started."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from launching import BIN, ROOT, free_port

SCRIPT = ROOT / "cluster" / "ray_head.sh"
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")


@dataclass(frozen=True)
class Head:
    """A head that answers."""

    process: subprocess.Popen[bytes]
    dashboard: str
    environment: dict[str, str]
    folder: Path
    log: Path


def of_session(leader: int) -> list[psutil.Process]:
    """Every process of the session that a process leads: Ray's workers have groups of their own."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def status_of(url: str, token: str = "") -> int:
    """The status of the answer; 0 while nobody answers."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as a:
            return a.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def environment_of(folder: Path, **values: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"HOME": str(folder), "PATH": f"{BIN}:{os.environ['PATH']}"} | values


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Sockets below it have names of at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="rh", dir="/tmp"))
    dashboard = free_port()
    # Ray refuses 10002 to 19999 for the head; the kernel's free ports lie above.
    environment = environment_of(
        folder,
        DIST_DML_RAY_PORT=str(free_port()),
        DIST_DML_RAY_DASHBOARD_PORT=str(dashboard),
        RAY_AUTH_TOKEN="of-an-environment-that-must-not-count",
    )
    command = [str(SCRIPT), "--temp-dir", str(folder / "t"), "--num-cpus", "1"]
    command += ["--object-store-memory", "100000000"]
    command += ["--ray-client-server-port", str(free_port())]
    command += ["--dashboard-agent-listen-port", str(free_port())]
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 120
        while not status_of(f"{url}/api/version"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield Head(process, url, environment, folder, log)
    finally:
        # Never `ray stop`: it would end every Ray of the machine.
        for left in of_session(process.pid):
            left.kill()
        process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@needs_ray
def test_nothing_is_answered_without_the_token(head: Head) -> None:
    file = head.folder / ".ray" / "auth_token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    token = file.read_text()
    assert len(token) == 64
    for path in ("/api/version", "/api/jobs/", "/nodes?view=summary"):
        assert status_of(head.dashboard + path) == 401, path
        assert status_of(head.dashboard + path, "of-an-environment-that-must-not-count") in (
            401,
            403,
        )
        assert status_of(head.dashboard + path, token) == 200, path
    assert token not in head.log.read_text()
    assert all(token not in " ".join(p.cmdline()) for p in of_session(head.process.pid))


@pytest.mark.slow
@needs_ray
def test_a_job_with_the_token_runs_and_one_without_it_is_refused(head: Head) -> None:
    (head.folder / "work").mkdir()
    (head.folder / "work" / "job.py").write_text("print('the job ran')\n")
    command = [str(BIN / "ray"), "job", "submit", "--address", head.dashboard]
    command += ["--working-dir", str(head.folder / "work"), "--", "python", "job.py"]
    other = environment_of(head.folder, RAY_AUTH_MODE="disabled")
    refused = subprocess.run(command, env=other, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert "AuthenticationError" in refused.stderr
    assert "the job ran" not in refused.stdout + refused.stderr
    given = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    given["RAY_AUTH_TOKEN_PATH"] = str(head.folder / ".ray" / "auth_token")
    accepted = environment_of(head.folder, **given)
    done = subprocess.run(command, env=accepted, capture_output=True, text=True, timeout=120)
    assert "the job ran" in done.stdout + done.stderr


@pytest.mark.slow
@needs_ray
def test_every_process_of_the_head_listens_on_the_loopback_alone(head: Head) -> None:
    listening = [
        connection.laddr
        for process in of_session(head.process.pid)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    for address in listening:
        ip = ipaddress.ip_address(address.ip)
        ip = getattr(ip, "ipv4_mapped", None) or ip
        assert ip.is_loopback, address


@pytest.mark.slow
@needs_ray
def test_the_head_ends_with_all_that_it_started(head: Head) -> None:
    assert len(of_session(head.process.pid)) > 5
    head.process.send_signal(signal.SIGTERM)
    head.process.wait(60)
    deadline = time.monotonic() + 20
    while left := of_session(head.process.pid):
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.2)


@needs_ray
def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("x" * 64)
    token.chmod(0o644)
    done = subprocess.run(
        [str(SCRIPT)],
        env=environment_of(tmp_path, RAY_AUTH_TOKEN_PATH=str(token)),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "others may read" in done.stderr
    assert "x" * 64 not in done.stdout + done.stderr
