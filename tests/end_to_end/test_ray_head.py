"""The Ray head: on the loopback, behind a token, and gone with all that it started."""

from __future__ import annotations

import ipaddress
import signal
import stat
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from launching import BIN
from ray_head import SCRIPT, Head, environment_of, head, needs_ray, of_session, status_of

__all__ = ["head"]


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
    refused = subprocess.run(command, env=other, capture_output=True, text=True, timeout=300)
    assert refused.returncode != 0
    assert "AuthenticationError" in refused.stderr
    assert "the job ran" not in refused.stdout + refused.stderr
    given = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    given["RAY_AUTH_TOKEN_PATH"] = str(head.folder / ".ray" / "auth_token")
    accepted = environment_of(head.folder, **given)
    done = subprocess.run(command, env=accepted, capture_output=True, text=True, timeout=300)
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
