"""The watchdog: who holds the others up, in words, and where a thread is."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from dist_dml.parallel.step_watch import Place, StepWatch, finding, where
from dist_dml.parallel.world import Ranks, World


def place(rank: int, name: str) -> Place:
    return Place(rank, f"node{rank}", name, 7, 61.4, f"dist_dml/{name}.py:1 f")


@pytest.mark.parametrize(
    ("places", "text"),
    [
        (
            ["collective", "data", "collective"],
            "worker 1 (node1) is in data (dist_dml/data.py:1 f); worker 0, 2 waits for it",
        ),
        (
            ["collective", "step", "collective"],
            "worker 1 (node1) is in step (dist_dml/step.py:1 f); worker 0, 2 waits for it",
        ),
        (
            ["collective", None, "collective"],
            "worker 1 says nothing: stopped, cut off, or its machine is gone; worker 0, 2 waits "
            "for it",
        ),
        (
            ["collective", "collective"],
            "worker 0 (node0) is in collective (dist_dml/collective.py:1 f); worker 1 (node1) is "
            "in collective (dist_dml/collective.py:1 f); all wait for each other: look at the "
            "network between them",
        ),
        (["data"], "worker 0 (node0) is in data (dist_dml/data.py:1 f)"),
    ],
)
def test_it_names_the_workers_that_are_not_where_the_others_wait(
    places: list[str | None], text: str
) -> None:
    found = {rank: place(rank, name) for rank, name in enumerate(places) if name is not None}
    said = finding(place(0, places[0] or ""), found, len(places))
    assert said == f"step 8 has taken 61 s so far: {text}"


@pytest.mark.parametrize(
    ("name", "limit"),
    # An evaluation takes its time, up to the longest that workers wait for each other.
    [("data", 600), ("checkpoint", 600), ("tracker", 600), ("evaluation", 0.4)],
)
def test_a_thread_that_hangs_is_found_in_its_place(
    name: str, limit: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A pipe without a writer: the file system that does not answer.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    watch = StepWatch(World(Ranks(), torch.device("cpu"), None, None), 0.3, limit)

    def hang() -> None:
        watch.start()
        watch.at(name, 4)
        pipe.read_bytes()
        watch.stop()

    thread = threading.Thread(target=hang)
    thread.start()
    said = ""
    for _ in range(200):
        said += capsys.readouterr().err
        if "warning" in said:
            break
        thread.join(0.05)
    pipe.write_bytes(b"")
    thread.join(10)
    assert "dist_dml: warning: step 5 has taken 0 s so far: worker 0 (" in said
    assert f") is in {name} (" in said


def test_the_innermost_line_of_the_package_is_told() -> None:
    watch = StepWatch(World(Ranks(), torch.device("cpu"), None, None), 60, 600)
    seen = []

    def batches():
        yield where(sys._getframe())

    seen = list(watch.fetching(batches(), 0))
    assert seen[0][0] is False
    assert seen[0][1].startswith("dist_dml/parallel/step_watch.py:")
    assert seen[0][1].endswith(" fetching")
