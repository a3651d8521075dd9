"""Trainings beside an MLflow server that fails in every way: nothing waits, and nothing is lost.

All trainings run at the same time, once for the whole file, as the end of each waits up to a minute
for MLflow.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_doors import Door, Fault, Request, doors_to
from launching import Finished, Launcher, finish, start_command, training_processes
from mlflow_store import Store, contents, mlflow_server, records_of

from dist_dml.tracking import run_files
from dist_dml.tracking.mlflow_mirror import MOST_METRICS_A_CALL
from dist_dml.tracking.mlflow_run import flatten_config

pytestmark = pytest.mark.slow

Trainings = tuple[Launcher, dict[str, tuple[Finished, float]]]
"""The launcher, and how each training ended and when (Unix seconds)."""

STEPS = 58
WORKERS = {"refused": 1, "failing": 1, "silent": 1, "slow": 1, "breaking": 2}
"""The ways to fail, and how many workers train meanwhile."""


class Breaking:
    """Takes the first batch of records and fails from then on."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, request: Request) -> Fault:
        if self.taken:
            return 500
        self.taken += request.has_metrics
        return None


class Forgetful:
    """Does what it is asked to and loses the first answer to every request that writes."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, bytes]] = set()

    def __call__(self, request: Request) -> Fault:
        again = (request.path, request.body) in self.seen
        self.seen.add((request.path, request.body))
        return "lost" if request.writes and not again else None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as store:
        yield store


@pytest.fixture(scope="module")
def doors(store: Store) -> Iterator[dict[str, Door]]:
    """One door for each way to fail; `refused` stays shut."""
    behaviours = {
        "refused": lambda request: None,
        "failing": lambda request: 500,
        "silent": lambda request: "silent",
        "slow": lambda request: 1.5,
        "breaking": Breaking(),
        "forgetful": Forgetful(),
    }
    with doors_to(store.port, **behaviours) as doors:
        for name, door in doors.items():
            if name != "refused":
                door.open()
        yield doors


@pytest.fixture(scope="module")
def runs(
    data: Path, doors: dict[str, Door], store: Store, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trainings]:
    """All trainings, each before its own door."""
    launcher = Launcher(data, tmp_path_factory.mktemp("tracked") / "runs")
    started = {}
    for name, workers in WORKERS.items():
        words = [f"run.name={name}", "tracking.mlflow=true", f"tracking.experiment={name}"]
        words += [f"tracking.mlflow_uri={doors[name].url}", f"training.max_steps={STEPS}"]
        # Two threads each would stand in each other's way: six workers share the machine.
        words += ["training.epochs=1000", "checkpoint.every_epochs=0", "engine.threads=1"]
        # The other worker waits for the first one, which waits for MLflow.
        words += ["engine.timeout_seconds=60"]
        kind = "python" if workers == 1 else "by hand"
        started[name] = launcher.start(kind, workers, *words)
    deadline = time.monotonic() + 300

    def wait(name: str) -> tuple[Finished, float]:
        return launcher.wait(started[name], deadline), time.time()

    try:
        with ThreadPoolExecutor(len(started)) as pool:
            yield launcher, dict(zip(started, pool.map(wait, started), strict=True))
    finally:
        for process in training_processes(launcher.root.parent):
            process.kill()


@pytest.fixture(scope="module")
def synced(
    runs: Trainings, doors: dict[str, Door], store: Store
) -> dict[str, list[dict[str, Any]]]:
    """What MLflow holds of each run after the doors are healed and `track sync` ran once and
    twice."""
    root = runs[0].root
    for name in WORKERS:
        doors[name].heal()
    held: dict[str, list[dict[str, Any]]] = {name: [] for name in WORKERS}
    for _ in range(2):
        before = {name: len(doors[name].requests) for name in WORKERS}
        code, output = finish(
            start_command("track", "sync", *(str(root / name) for name in WORKERS))
        )
        assert code == 0, output
        for name in WORKERS:
            held[name].append(contents(store, name))
            asked = doors[name].requests[before[name] :]
            held[name][-1]["writes"] = [request.path for request in asked if request.writes]
    return held


@pytest.mark.parametrize("name", WORKERS)
def test_training_ends_well_and_in_bounded_time_whatever_mlflow_does(
    runs: Trainings, name: str
) -> None:
    launcher, trainings = runs
    finished, ended_at = trainings[name]
    assert finished.exit_code == 0, finished.output
    assert sorted(launcher.losses(name)) == list(range(1, STEPS + 1))
    assert len(list((launcher.root / name / "checkpoints").glob("step-*"))) == 1
    last = run_files.last_status(launcher.root / name)
    assert last["status"] == "FINISHED"
    assert ended_at - last["time"] < 90  # It waits for a minute.
    assert not training_processes(launcher.root)


@pytest.mark.parametrize("name", ["refused", "failing", "silent", "breaking"])
def test_what_mlflow_lacks_is_said_in_one_line_with_the_command_that_sends_it(
    runs: Trainings, name: str
) -> None:
    launcher, trainings = runs
    output = trainings[name][0].output
    (line,) = [line for line in output.splitlines() if "MLflow" in line]
    assert "nothing is lost" in line
    assert f"`dist-dml track sync {launcher.root / name}` sends the rest" in line
    assert "Traceback" not in output


def test_no_trainer_ever_spoke_to_mlflow(runs: Trainings, doors: dict[str, Door]) -> None:
    """What could make the loop wait is a connection of its own, and there is none."""
    known = ("dist_dml.tracking.mirror_process", " track sync ", "gone already")
    for name in WORKERS:
        visitors = doors[name].visitors
        assert visitors or name == "refused"
        for visitor in visitors:
            assert any(part in visitor for part in known), visitor


def test_the_server_that_broke_had_taken_a_part_of_the_records(
    runs: Trainings, doors: dict[str, Door]
) -> None:
    breaking = doors["breaking"].behave
    assert isinstance(breaking, Breaking)
    assert breaking.taken == 1
    # A call brings at most a thousand, so the rest was still to come.
    assert sum(map(len, records_of(runs[0].root / "breaking").values())) > MOST_METRICS_A_CALL


@pytest.mark.parametrize("name", WORKERS)
def test_after_a_sync_every_record_is_in_mlflow_once(
    runs: Trainings,
    synced: dict[str, list[dict[str, Any]]],
    name: str,
) -> None:
    folder, held = runs[0].root / name, synced[name][0]
    expected = records_of(folder)
    assert len(expected["train/loss"]) == STEPS
    assert held["points"] == expected
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert held["params"] == flatten_config(config)
    identity = json.loads((folder / "run.json").read_text())
    assert {"dist_dml.run_id": identity.pop("run_id")}.items() <= held["tags"].items()
    facts = {key: value for key, value in identity.items() if isinstance(value, str)}
    assert facts.items() <= held["tags"].items()
    assert len(held["data"]) == 1
    assert held["status"] == "FINISHED"
    events, _ = run_files.complete_lines(folder / run_files.EVENTS, 0)
    noted = {
        f"{event['folder']}/{Path(event['path']).name}".lstrip("/"): event["path"]
        for event in events
        if "path" in event
    }
    assert {"config.yaml", "report/curves.png", "report/gallery.png"} <= set(noted)
    assert held["artifacts"] == {
        where: (folder / path).read_bytes() for where, path in noted.items()
    }


@pytest.mark.parametrize("name", WORKERS)
def test_a_second_sync_changes_nothing(synced: dict[str, list[dict[str, Any]]], name: str) -> None:
    first, second = synced[name]
    assert second.pop("writes") == []
    first.pop("writes")
    assert second == first


def test_a_server_whose_answers_are_lost_holds_everything_once(
    runs: Trainings, doors: dict[str, Door], store: Store
) -> None:
    """Each request that writes arrives twice: the client cannot know that the first one did."""
    folder, door = runs[0].root / "slow", doors["forgetful"]
    words = ["track", "sync", str(folder), "--uri", door.url, "--experiment", "forgetful"]
    for _ in range(10):
        code, output = finish(start_command(*words))
        if code == 0:
            break
        assert "nothing is lost" in output
    assert code == 0, output
    held = contents(store, "forgetful")
    assert held["points"] == records_of(folder)
    assert len(held["data"]) == 1
    assert held["status"] == "FINISHED"
