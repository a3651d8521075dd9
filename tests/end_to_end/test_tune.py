"""`dist-dml tune` for real: Ray's trials, early stops, failures, and a driver that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from searches import SPACE, digits, files

from dist_dml.cli import main

__all__ = ["digits"]

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="needs the extra `tune`")


def tuned(words: list[str], folder: Path, expected: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_dml.tune", *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == expected, done.stderr[-3000:]
    return done


def ledger(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "runs/study/ledger.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in ledger(folder) if event["event"] == kind]


def names_of(folder: Path) -> set[str]:
    """Of what the runs in a folder have recorded."""
    files = folder.rglob("metrics.jsonl")
    return {json.loads(line)["name"] for file in files for line in file.read_text().splitlines()}


def test_a_search_ends_what_falls_behind_and_what_fails_alone_and_confirms_the_best(
    tmp_path: Path, digits: Path
) -> None:
    search = {
        "space": SPACE | {"model.backbone": {"choice": ["small_conv", "timm:no_such_network"]}},
        "start": [
            {"model.backbone": "timm:no_such_network", "optimizer.learning_rate": 1e-3},
            {"model.backbone": "small_conv", "optimizer.learning_rate": 5e-3},
            {"model.backbone": "small_conv", "optimizer.learning_rate": 1e-4},
        ],
        "budget": {"trials": 3},
        # The good setting comes first, so that the bad one has something to fall behind.
        "stop": {"name": "asha", "grace": 0.2, "reduction": 2},
        "trial": {"concurrent": 1},
        "confirm": {"seeds": 2, "metric": "back/cosine/map_at_r"},
    }
    done = with_count(files(tmp_path, digits, search), tmp_path)
    ends = {event["trial"]: event for event in events(tmp_path, "end")}
    assert ends["trial-000"]["state"] == "failed"
    assert ends["trial-000"]["reason"].count("\n") == 0
    assert "no_such_network" in ends["trial-000"]["reason"]
    assert "trial-000 failed: " in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert ends["trial-001"]["state"] == "complete"
    assert ends["trial-002"]["state"] == "stopped"
    study = json.loads((tmp_path / "runs/study/study.json").read_text())
    assert study["best"] == "trial-001"
    # What confirms is not looked at while something may still be chosen.
    measured = {kind: names_of(tmp_path / "runs/study" / kind) for kind in ("trial-001", "confirm")}
    assert not any(name.startswith("back/") for name in measured["trial-001"])
    assert any(name.startswith("back/") for name in measured["confirm"])
    confirmation = study["confirmation"]
    assert len(confirmation["best"]) == len(confirmation["default"]) == 2
    low, high = confirmation["interval_95"]
    assert low < confirmation["difference"] < high
    assert "95% interval" in done.stdout
    best = str(tmp_path / "runs/study/best.yaml")
    assert main(["config", "show", "--config", best]) == 0
    assert yaml.safe_load(Path(best).read_text())["optimizer"]["learning_rate"] == 5e-3


def test_a_killed_driver_loses_no_trial_and_runs_none_twice(tmp_path: Path, digits: Path) -> None:
    search = {"budget": {"trials": 2}, "stop": {"name": "none"}, "trial": {"concurrent": 1}}
    words = files(tmp_path, digits, search)
    driver = subprocess.Popen(
        [sys.executable, "-m", "dist_dml.tune", *words],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    path = tmp_path / "runs/study/ledger.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        # In the middle: one has ended, the next has begun and been evaluated.
        if path.exists() and len(events(tmp_path, "end")) >= 1:
            reported = {event["trial"] for event in events(tmp_path, "report")}
            if len(reported) >= 2:
                break
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    before = ledger(tmp_path)
    ended = {event["trial"] for event in before if event["event"] == "end"}
    assert len(ended) == 1
    tuned(words, tmp_path)
    after = ledger(tmp_path)
    assert after[: len(before)] == before
    begun = [event["trial"] for event in after if event["event"] == "begin"]
    assert begun == ["trial-000", "trial-001"]
    assert sorted(event["trial"] for event in after if event["event"] == "end") == begun
    again = after[len(before) :]
    assert not ended & {event["trial"] for event in again}
    # The whole of each training, and no evaluation noted twice.
    steps = [(e["trial"], e["step"]) for e in after if e["event"] == "report"]
    assert len(steps) == len(set(steps)) == 4


_FREE = """
import json, sys, time
import ray
from dist_dml.tuning import cluster
start = ray.init
# Without it Ray's own cleaner of what a stopped trial held does nothing: ours must.
ray.init = lambda **settings: start(**settings | {"include_dashboard": False})
before = cluster.run_trials
def checked(*arguments, **named):
    before(*arguments, **named)
    total = ray.cluster_resources()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        free = ray.available_resources()
        if free.get("CPU", 0) == total["CPU"]:
            break
        time.sleep(0.5)
    print(json.dumps({"total": total["CPU"], "free": free.get("CPU", 0)}), flush=True)
cluster.run_trials = checked
from dist_dml.tune import main
sys.exit(main(sys.argv[1:]))
"""


def with_count(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A search that says what is free when its trials have ended, which must be everything."""
    done = subprocess.run(
        [sys.executable, "-c", _FREE, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    held = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert held["free"] == held["total"]
    return done


def test_trials_of_two_workers_train_together_and_end_early_together(
    tmp_path: Path, digits: Path
) -> None:
    search = {
        "start": [{"optimizer.learning_rate": 5e-3}, {"optimizer.learning_rate": 1e-4}],
        "budget": {"trials": 2},
        "stop": {"name": "asha", "grace": 0.2, "reduction": 2},
        "trial": {"workers": 2, "cpus": 0.9},
    }
    with_count(files(tmp_path, digits, search), tmp_path)
    ends = {event["trial"]: event["state"] for event in events(tmp_path, "end")}
    assert ends == {"trial-000": "complete", "trial-001": "stopped"}
    [manifest] = (tmp_path / "runs/study/trial-000/checkpoints").glob("*/manifest.json")
    assert len(json.loads(manifest.read_text())["class_files"]) == 2
    last = {event["trial"]: event["share"] for event in events(tmp_path, "report")}
    assert last == {"trial-000": 1.0, "trial-001": 0.5}


def test_what_fits_nowhere_is_refused_before_the_first_trial(tmp_path: Path, digits: Path) -> None:
    search = {"trial": {"workers": 64, "cpus": 8}}
    done = tuned(files(tmp_path, digits, search), tmp_path, expected=2)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("dist_dml: error")]
    assert "64 workers x 8 CPU" in line
    assert "would wait for ever" in line
    assert not events(tmp_path, "begin")
