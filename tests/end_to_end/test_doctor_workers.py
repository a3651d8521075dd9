"""`dist-dml doctor` under launchers: workers measure together, one report, one exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import BIN, ROOT, finish, free_port, kill_tree, plain_environment

pytestmark = pytest.mark.slow

DOCTOR = (sys.executable, "-m", "dist_dml.doctor")


def started(words: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    # Whatever Ray has left in this user's home is not what these tests are about.
    variables |= {"RAY_AUTH_TOKEN_PATH": "/nonexistent/token", "RAY_AUTH_MODE": ""}
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=plain_environment() | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def by_hand(rank: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    variables = {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    return started([*DOCTOR, *arguments], **variables)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_workers_measure_bandwidth_and_clocks_and_print_once(
    launcher: str, tmp_path: Path
) -> None:
    port = str(free_port())
    head = {
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", port, "-m"],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", port, "--module"],
    }[launcher]
    words = [str(BIN / head[0]), *head[1:], "dist_dml.doctor", "--json", f"run.root={tmp_path}"]
    if launcher == "deepspeed":
        words += ["engine.name=deepspeed"]
    process = started([*words, "tracking.mlflow=false"])
    try:
        out, error = process.communicate(timeout=200)
    finally:
        kill_tree(process.pid)
    assert process.returncode == 0, out + error
    # DeepSpeed's launcher writes lines of its own to the same place.
    report = json.JSONDecoder().raw_decode(out[f"\n{out}".index("\n{") :])[0]
    assert (report["workers"], len(report["hosts"])) == (2, 1)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert len(found) == len(report["findings"]), "a check of the host ran on both workers"
    assert found["meeting"]["values"] == {"workers": 2, "hosts": 1}
    assert 0 < found["gloo latency"]["values"]["seconds"] < 1
    for name in ("gloo all-reduce", "gloo all-gather"):
        assert found[name]["values"]["bus_bytes_per_second"] > 1e6
        assert [rate["bytes"] for rate in found[name]["values"]["rates"]] == [2**16, 2**20, 2**24]
    assert "two workers agree" in found["clocks"]["measured"]
    assert error.count("dist-dml doctor: meeting") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_is_alone_says_what_is_wrong_here_and_with_the_meeting(
    tmp_path: Path,
) -> None:
    process = by_hand(0, free_port(), "--wait", "3", f"run.root={tmp_path}")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1, error
    assert "problem  meeting" in out
    assert "did not meet the other 1" in " ".join(out.split())
    # What this host has is told all the same.
    assert "\nstorage\n" in out
    assert out.splitlines()[-1].startswith("1 problem, ")


def test_a_worker_that_dies_in_the_middle_ends_the_others_with_a_report(tmp_path: Path) -> None:
    port = free_port()
    processes = [by_hand(rank, port, f"run.root={tmp_path}") for rank in range(2)]
    first, second = processes
    assert first.stderr is not None
    try:
        said = ""
        while "versions" not in said:  # They have met.
            said += first.stderr.read(1)
        second.kill()
        second.communicate()
        begun = time.monotonic()
        code, out = finish(first, 120)
    finally:
        for process in processes:
            kill_tree(process.pid)
    assert code == 1
    assert "the connection broke" in " ".join(out.split())
    assert time.monotonic() - begun < 60
