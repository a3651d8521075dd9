"""A Ray head for tests, started as `cluster/ray_head.sh` does: on the loopback, with a token."""

from __future__ import annotations

import importlib.util
import os
import shutil
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
        deadline = time.monotonic() + 300
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
