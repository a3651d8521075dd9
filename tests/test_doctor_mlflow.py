"""What the doctor says of MLflow: against servers on the loopback that misbehave."""

from __future__ import annotations

import base64
import json
import socket
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from doctor_server import answering, by_name, silent

from dist_dml.config_loading import resolve
from dist_dml.doctor import mlflow_server
from dist_dml.doctor.findings import Finding, Setting
from dist_dml.doctor.http_request import ask, split_address
from dist_dml.parallel.world import Ranks

VERSION, API = "/version", "/api/2.0/mlflow/experiments/get-by-name"
EXPERIMENT = (200, json.dumps({"experiment": {"experiment_id": "1"}}))
ABSENT = (404, json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST"}))
GOOD = {VERSION: (200, "3.17.2"), API: EXPERIMENT}


def asked(
    url: str, environment: Mapping[str, str] | None = None, client: str = "3.17.2"
) -> dict[str, Finding]:
    return by_name(
        mlflow_server.server(url, url, "mine", client, environment or {}, timeout_seconds=0.5)
    )


def test_a_server_that_works_is_asked_twice_and_changed_never() -> None:
    for of_api, says in ((EXPERIMENT, "answers in"), (ABSENT, "the experiment will be made")):
        with answering({VERSION: (200, "3.17.2"), API: of_api}) as server:
            found = asked(server.url)
        assert {finding.level for finding in found.values()} == {"ok"}
        assert says in found["MLflow"].measured
        assert set(found) == {"MLflow", "MLflow version", "MLflow clock"}
        assert [path for path, _ in server.asked] == [VERSION, API]


@pytest.mark.parametrize(
    ("answer", "measured", "remedy"),
    [
        ((403, "Invalid Host header - possible DNS rebinding"), "answer to the name", "--allowed-"),
        ((403, "Permission denied"), "forbidden (403: Permission denied)", "ask for the right"),
        ((401, "You are not authenticated"), "asks for a user", "MLFLOW_TRACKING_USERNAME"),
        ((500, "QueuePool limit"), "the server fails (500: QueuePool limit)", "db upgrade"),
        ((200, "<html>log in</html>"), "something else than MLflow answers", "tracking.mlflow_uri"),
        ((404, "<html></html>"), "something else than MLflow answers", "tracking.mlflow_uri"),
    ],
)
def test_a_server_that_refuses_is_a_problem_with_its_remedy(
    answer: tuple[int, str], measured: str, remedy: str
) -> None:
    # The version is told to anybody, which says nothing of who may log.
    with answering({VERSION: (200, "3.17.2"), API: answer}) as server:
        found = asked(server.url)["MLflow"]
    assert found.level == "problem"
    assert measured in found.measured
    assert remedy in found.remedy


def test_a_silent_and_an_absent_server_are_told_apart_within_the_time_limit() -> None:
    started = time.monotonic()
    with silent() as url:
        found = asked(url)
    assert time.monotonic() - started < 5
    assert "no answer within 0.5 s" in found["MLflow"].measured
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found = asked(f"http://127.0.0.1:{port}")
    assert "nothing listens there" in found["MLflow"].measured
    assert found["MLflow"].level == "problem"
    found = asked("http://no-such-host.invalid:5000")
    assert found["MLflow"].level == "problem"
    assert "no address" in found["MLflow"].measured


@pytest.mark.parametrize(
    ("ahead", "level"), [(0.0, "ok"), (60.0, "warning"), (-60.0, "warning"), (3600.0, "problem")]
)
def test_the_clock_of_the_server_is_compared(ahead: float, level: str) -> None:
    with answering(GOOD, ahead) as server:
        found = asked(server.url)["MLflow clock"]
    assert found.level == level
    assert found.values["skew"] == pytest.approx(ahead, abs=1.5)
    assert ("behind" in found.measured) == (ahead < 0)


@pytest.mark.parametrize(
    ("there", "level"), [("3.17.9", "ok"), ("3.10.0", "note"), ("2.9.1", "warning")]
)
def test_versions_of_server_and_client_are_compared(there: str, level: str) -> None:
    with answering({VERSION: (200, there), API: EXPERIMENT}) as server:
        found = asked(server.url)["MLflow version"]
    assert found.level == level
    assert there in found.measured


def test_credentials_are_sent_as_mlflow_does_and_never_shown_or_passed_on() -> None:
    expected = "Basic " + base64.b64encode(b"ann:s3/cret").decode()
    with answering(GOOD) as server:
        address = server.url.replace("http://", "http://ann:s3%2Fcret@")
        found = asked(address)
        assert {authorization for _, authorization in server.asked} == {expected}
        asked(server.url, {"MLFLOW_TRACKING_USERNAME": "b", "MLFLOW_TRACKING_PASSWORD": "pw"})
        assert server.asked[-1][1] == "Basic " + base64.b64encode(b"b:pw").decode()
        asked(server.url, {"MLFLOW_TRACKING_TOKEN": "tok"})
        assert server.asked[-1][1] == "Bearer tok"
    assert "s3" not in repr(found)
    with answering({"/there": (200, "x")}) as other:
        with answering({VERSION: (302, f"{other.url}/there")}) as server:
            answer = ask(f"{server.url}{VERSION}", split_address(address)[1], 5)
        assert (answer.status, answer.body) == (200, "x")
    assert other.asked == [("/there", "")]


def test_a_password_that_goes_unencrypted_to_another_host_is_told() -> None:
    url = "http://ann:pw@no-such-host.invalid"
    assert asked(url)["MLflow password"].level == "warning"
    with answering(GOOD) as server:
        assert "MLflow password" not in asked(server.url.replace("//", "//ann:pw@"))


def of_config(*overrides: str, several: bool = False, named: bool = False) -> dict[str, Finding]:
    ranks = Ranks(0, 2, 0, 1) if several else Ranks()
    setting = Setting(resolve(None, overrides).config, ranks, {}, mlflow_named=named)
    return by_name(iter(mlflow_server.mlflow_findings(setting)))


def test_the_default_database_is_looked_at_without_making_it(tmp_path: Path) -> None:
    root = f"run.root={tmp_path / 'runs'}"
    assert of_config(root)["MLflow"].level == "ok"
    assert list(tmp_path.iterdir()) == []
    assert of_config(root, "tracking.mlflow=false")["MLflow"].level == "skipped"
    assert of_config(root, "tracking.mlflow=false", named=True)["MLflow"].level == "ok"


def test_a_database_that_is_damaged_or_locked_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table alembic_version (version_num text)")
        connection.execute("insert into alembic_version values ('abc')")
    connection.close()
    found = by_name(mlflow_server.sqlite_file(path, Path("/"), False))
    assert found["MLflow"].measured.endswith("schema abc")
    locker = sqlite3.connect(path)
    locker.execute("begin exclusive")
    try:
        found = by_name(mlflow_server.sqlite_file(path, Path("/"), False))
        assert "locked" in found["MLflow"].measured
        assert found["MLflow"].level == "problem"
    finally:
        locker.close()
    path.write_bytes(b"no database" * 100)
    found = by_name(mlflow_server.sqlite_file(path, Path("/"), False))
    assert found["MLflow"].level == "problem"


def test_a_database_on_a_network_file_system_is_warned_of(tmp_path: Path) -> None:
    mounts = tmp_path / "proc/mounts"
    mounts.parent.mkdir()
    mounts.write_text(f"server:/x {tmp_path} nfs4 rw 0 0\n")
    found = by_name(mlflow_server.sqlite_file(tmp_path / "mlflow.db", tmp_path, True))
    assert found["MLflow database"].level == "warning"


def test_a_database_server_is_reached_or_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        address = f"postgresql+json://ann:s3cret@127.0.0.1:{port}/mlflow"
        found = by_name(mlflow_server.database(address, address, "postgresql"))
        assert found["MLflow"].level == "ok"
    found = by_name(mlflow_server.database(address, address, "postgresql"))
    assert found["MLflow"].level == "problem"
    assert "s3cret" not in repr(found)
    absent = address.replace("+json", "+absentdriver")
    found = by_name(mlflow_server.database(absent, absent, "postgresql"))
    assert found["MLflow driver"].remedy == "pip install absentdriver"
