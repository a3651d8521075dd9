"""MLflow in PostgreSQL, as in SQLite: the same content, many writers, a server that goes down."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from launching import Launcher, finish, start_command, training_processes
from mlflow_store import held_by, records_of
from postgres_server import PASSWORD, NoPostgreSQL, PostgreSQL, postgresql

from dist_dml.config import TrackingConfig
from dist_dml.tracking import run_files
from dist_dml.tracking.destination import destination_of
from dist_dml.tracking.mlflow_run import connect

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgreSQL]:
    """The password is in the environment alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_PG", quote(PASSWORD, safe=""))
        try:
            with postgresql() as server:
                yield server
        except NoPostgreSQL as reason:
            pytest.skip(str(reason))


@pytest.fixture(scope="module")
def runs(
    server: PostgreSQL, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Two trainings at the same time whose database goes down in their middle and comes back."""
    launcher = Launcher(data, tmp_path_factory.mktemp("postgresql") / "runs")
    words = ["tracking.mlflow=true", f"tracking.mlflow_uri={server.uri}", "training.epochs=1000"]
    words += ["checkpoint.every_epochs=0", "engine.threads=1", "training.max_steps=400"]
    started = {
        name: launcher.start("python", 1, f"run.name={name}", f"tracking.experiment={name}", *words)
        for name in ("one", "other")
    }
    deadline = time.monotonic() + 240
    try:
        # Until both have sent something: the tables are there then as well.
        states = [launcher.root / name / run_files.MIRROR_STATE for name in started]
        while not all(any(has_received(each)) for each in map(run_files.read_json, states)):
            assert time.monotonic() < deadline, "PostgreSQL has received nothing"
            time.sleep(0.2)
        server.kill()
        time.sleep(3)
        server.start()
        for processes in started.values():
            ended = launcher.wait(processes, deadline)
            assert ended.exit_code == 0, ended.output
            assert PASSWORD not in ended.output
        yield launcher.root
    finally:
        for process in training_processes(launcher.root.parent):
            process.kill()


def has_received(state: dict) -> list[bool]:
    """Of each store that a run is mirrored to: whether a metric has arrived there."""
    return [bool(store["last_step"]) for store in state.values()]


def held(tracking: TrackingConfig, root: Path, name: str) -> dict:
    """What the store has of the one run of experiment `name`."""
    destination = destination_of(tracking, root, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return held_by(connect(destination), name, root)


def test_postgresql_holds_what_sqlite_does_and_each_record_once(
    server: PostgreSQL, runs: Path
) -> None:
    names = [str(runs / name) for name in ("one", "other")]
    # The second has nothing to do.
    for uri in (server.uri, server.uri, f"sqlite:///{runs}/mlflow.db"):
        code, output = finish(start_command("track", "sync", "--uri", uri, *names))
        assert code == 0, output
    for name in ("one", "other"):
        theirs = held(TrackingConfig(mlflow_uri=server.uri, experiment=name), runs, name)
        ours = held(TrackingConfig(experiment=name), runs, name)
        assert theirs["status"] == ours["status"] == "FINISHED"
        assert theirs["points"] == records_of(runs / name)
        assert ours["points"] == theirs["points"]
        assert ours["params"] == theirs["params"]
        assert ours["tags"] == theirs["tags"]
        assert ours["data"] == theirs["data"]
        assert ours["artifacts"] == theirs["artifacts"]
        assert "config.yaml" in ours["artifacts"]


def test_the_outage_is_one_line_in_the_mirrors_log_and_no_file_has_the_password(
    runs: Path,
) -> None:
    for path in runs.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert PASSWORD.encode() not in content, path
            assert quote(PASSWORD, safe="").encode() not in content, path
    logs = [(runs / name / run_files.MIRROR_LOG).read_text() for name in ("one", "other")]
    assert any("OperationalError" in log or "connection" in log for log in logs), logs
