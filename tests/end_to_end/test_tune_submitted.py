"""Searches that are sent to a cluster: `ray job submit`, and `ray submit` through an sshd.

Both ship the code, from a copy of the checkout that says who it is; the data stay where they are.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from launching import BIN, ROOT, free_port
from ray_head import Head, environment_of, head, needs_ray, of_session
from searches import digits, files
from ssh_host import NoSsh, SshHost, ssh_host

__all__ = ["digits", "head"]
pytestmark = [pytest.mark.slow, needs_ray]

SEARCH: dict[str, Any] = {
    "budget": {"trials": 1},
    "start": [{"optimizer.learning_rate": 5e-3}],
    "trial": {"concurrent": 1},
}
SHORT = ["training.epochs=1"]
SHIPPED = "the code that was sent trains"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a user has before him, with a change that is nowhere else."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("dist_dml", "configs", "cluster"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    with (folder / "dist_dml" / "train.py").open("a") as stream:
        stream.write(
            "\n_loop = loop\n\n\ndef loop(config, run, world, companions):\n"
            f"    companions.journal._recorder.record(0, 0, 0.0, {{{SHIPPED!r}: 1.0}})\n"
            "    return _loop(config, run, world, companions)\n"
        )
    return folder


def check_study(root: Path) -> None:
    """One trial, trained by the code that was sent, on data that were not."""
    study = json.loads((root / "study" / "study.json").read_text())
    assert study["best"] == "trial-000"
    trial = root / "study" / "trial-000"
    assert SHIPPED in (trial / "metrics.jsonl").read_text()


def test_a_job_tunes_with_the_code_that_ships_and_data_that_stay(
    head: Head, checkout: Path, digits: Path, tmp_path: Path
) -> None:
    words = files(tmp_path, digits, SEARCH)
    for name in ("search.yaml", "config.yaml"):  # They ship too.
        shutil.move(tmp_path / name, checkout / "configs" / name)
    words = [word.replace(str(tmp_path), "configs") for word in words]
    given = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    given["RAY_AUTH_TOKEN_PATH"] = str(head.folder / ".ray" / "auth_token")
    command = [str(BIN / "ray"), "job", "submit", "--address", head.dashboard]
    command += ["--working-dir", ".", "--", "python", "-m", "dist_dml.tune", *words, *SHORT]
    done = subprocess.run(
        command,
        cwd=checkout,
        env=environment_of(head.folder, **given),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stdout
    check_study(tmp_path / "runs")


@pytest.fixture
def host(checkout: Path) -> Iterator[SshHost]:
    """Reached by ssh; its virtual environment is ours, so that nothing is downloaded."""
    folder = Path(tempfile.mkdtemp(prefix="sh", dir="/tmp"))
    variables = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR": "/tmp"}
    try:
        with ssh_host(folder, variables) as host:
            (host.home / "venv").symlink_to(BIN.parent)
            try:
                yield host
            finally:
                end_ray(host)
    except NoSsh as reason:
        pytest.skip(str(reason))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def end_ray(host: SshHost) -> None:
    """As cluster/README.md says, and without waiting for it: never `ray stop`."""
    file = host.home / ".ray" / "dist_dml.pid"
    if file.exists():
        for left in of_session(int(file.read_text())):
            left.kill()
    for state in Path("/tmp/ray").glob(f"cluster-dist-dml-{os.getpid()}.*"):
        state.unlink()  # What `ray up` has noted of the cluster.
    for process in psutil.process_iter(["cmdline"]):
        if any(str(host.home) in part for part in process.info["cmdline"] or []):
            process.kill()


def cluster_file(host: SshHost, folder: Path) -> Path:
    """cluster/ray/onprem.yaml as a user edits it: one machine, whose packages are there already."""
    text = (ROOT / "cluster" / "ray" / "onprem.yaml").read_text()
    ports = {"6379": free_port(), "8265": free_port(), "8076": free_port()}
    for port, ours in ports.items():
        text = text.replace(port, str(ours))
    # Where other tests have their own Ray, "auto" would be whichever was started last.
    assert "RAY_ADDRESS=auto" in text
    text = text.replace("RAY_ADDRESS=auto", f"RAY_ADDRESS={host.address}:{ports['6379']}")
    content = yaml.safe_load(text.replace("/home/ray", str(host.home)))
    content["cluster_name"] = f"dist-dml-{os.getpid()}"
    content["provider"] |= {"head_ip": host.address, "worker_ips": []}
    content["auth"] = {"ssh_user": "root", "ssh_private_key": str(host.key)}
    token = f"{host.home}/.ray/auth_token"
    content["file_mounts"] = {**content["file_mounts"], token: str(folder / "auth_token")}
    content["setup_commands"] = []
    # A machine of this size, and nothing that listens where others may ask.
    content["head_start_ray_commands"] = [
        command.replace(
            "--disable-usage-stats",
            f"--disable-usage-stats --num-cpus=1 --object-store-memory=100000000"
            f" --temp-dir={host.home.parent}/t --dashboard-agent-listen-port={free_port()}"
            f" --ray-client-server-port={free_port()}",
        )
        for command in content["head_start_ray_commands"]
    ]
    path = folder / "onprem.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_ray_submit_runs_the_search_on_a_machine_that_is_reached_by_ssh(
    host: SshHost, checkout: Path, digits: Path, tmp_path: Path
) -> None:
    words = files(tmp_path, digits, SEARCH)
    (tmp_path / "auth_token").write_text("0123456789abcdef" * 4)
    (tmp_path / "auth_token").chmod(0o600)
    path = cluster_file(host, tmp_path)
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "auth_token")}
    environment = environment_of(tmp_path, RAY_USAGE_STATS_ENABLED="0", **variables)

    def ray(*given: str, seconds: float = 200) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(BIN / "ray"), *given],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done

    ray("up", "-y", str(path))
    deadline = time.monotonic() + 60
    while not (host.home / ".ray" / "dist_dml.pid").exists():
        assert time.monotonic() < deadline, "Ray did not start there"
        time.sleep(0.2)
    done = ray("submit", str(path), "dist_dml/tune.py", "--", *words, *SHORT, seconds=300)
    assert "Traceback" not in done.stdout + done.stderr
    check_study(tmp_path / "runs")
