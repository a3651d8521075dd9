"""Trainings that end by time: together, once, and further with more of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import Launcher

pytestmark = pytest.mark.slow


def last_progress(folder: Path) -> dict:
    """Of the newest checkpoint."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return json.loads((newest / "manifest.json").read_text())["progress"]


def rates(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r["value"] for r in records if r["name"] == "train/learning_rate"]


def test_time_ends_a_training_of_two_workers_and_more_time_continues_it_on_one(
    launcher: Launcher,
) -> None:
    words = ["run.name=timed", "training.epochs=100000", "schedule={name: cosine}"]
    done = launcher.run("by hand", 2, *words, "training.max_seconds=2")
    assert done.exit_code == 0, done.output
    assert "200000 steps or 2 s of 128 images" in done.output
    folder = launcher.root / "timed"
    ended = last_progress(folder)
    assert 2 <= ended["seconds"] < 20
    # The checkpoint and the evaluation are of the last step that was trained.
    assert max(launcher.losses("timed")) == ended["step"] < 200_000
    fallen = rates(folder)
    # By the time that had passed when a step began, which a slow machine's steps are part of.
    assert 0.04 < fallen[0] <= 0.05
    assert fallen == sorted(fallen, reverse=True)
    assert fallen[-1] < 0.9 * fallen[0]

    again = launcher.run("by hand", 2, *words, "training.max_seconds=2", "--resume", "auto")
    assert again.exit_code == 0, again.output
    assert "has trained for its 2 seconds; raise training.max_seconds" in again.output
    assert last_progress(folder) == ended

    longer = launcher.run(
        "python",
        1,
        *words,
        "training.max_seconds=30",
        "--resume",
        "auto",
        f"training.max_steps={ended['step'] + 5}",
    )
    assert longer.exit_code == 0, longer.output
    # The nearer of both limits ends it.
    assert last_progress(folder)["step"] == ended["step"] + 5
