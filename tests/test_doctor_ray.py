"""What the doctor says of Ray's token, and of clusters on the loopback that misbehave."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from doctor_server import answering, by_name

from dist_dml.doctor import ray_cluster


def token_levels(home: Path, **environment: str) -> dict[str, str]:
    found = ray_cluster.token_findings(environment, home)
    return {finding.name: finding.level for finding in found}


def test_the_token_of_ray_belongs_to_its_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "is_shielded", lambda path: False)
    path = tmp_path / ".ray" / "auth_token"
    assert token_levels(tmp_path)["Ray token"] == "note"
    assert token_levels(tmp_path, RAY_AUTH_MODE="token")["Ray token"] == "problem"
    assert token_levels(tmp_path, RAY_AUTH_MODE="disabled")["Ray token"] == "warning"
    assert token_levels(tmp_path, RAY_AUTH_MODE="tokens")["Ray token"] == "problem"
    path.parent.mkdir()
    path.write_text("abc\n")
    for mode, level in ((0o600, "ok"), (0o400, "ok"), (0o640, "problem"), (0o604, "problem")):
        path.chmod(mode)
        found = token_levels(tmp_path, RAY_AUTH_MODE="token")
        assert found == {"Ray token": "ok", "Ray token file": level}, oct(mode)
    path.chmod(0o600)
    # Ray's servers ask for a token that is there, its command line does not send it.
    assert token_levels(tmp_path)["Ray token"] == "note"
    elsewhere = token_levels(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH="/nowhere/t")
    assert elsewhere["Ray token"] == "problem"
    in_environment = token_levels(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="xyz")
    assert in_environment["RAY_AUTH_TOKEN"] == "note"
    path.write_text("")
    assert token_levels(tmp_path, RAY_AUTH_MODE="token")["Ray token file"] == "problem"


def test_a_closed_folder_around_an_open_token_is_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("abc")
    path.chmod(0o644)
    tmp_path.chmod(0o700)
    assert ray_cluster.token_file(path).level == "warning"
    assert not ray_cluster.is_shielded(Path("/usr/bin/env"))


def test_the_token_that_is_sent_is_the_one_that_ray_would_send(tmp_path: Path) -> None:
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("abc\n")
    mode = {"RAY_AUTH_MODE": "token"}
    assert ray_cluster.token_of({}, tmp_path) == ""
    assert ray_cluster.token_of(mode, tmp_path) == "abc"
    assert ray_cluster.token_of(mode | {"RAY_AUTH_TOKEN": "xyz"}, tmp_path) == "xyz"
    assert ray_cluster.token_of(mode, tmp_path / "other") == ""


@pytest.mark.parametrize(
    ("answer", "token", "level", "says"),
    [
        ((200, '{"ray_version": "2.60.0"}'), "", "ok", "as here"),
        ((200, '{"ray_version": "2.51.0"}'), "", "warning", "2.60.0 is installed here"),
        ((401, "Unauthorized"), "", "problem", "it asks for a token"),
        ((403, "Forbidden"), "abc", "problem", "it refuses the token"),
        ((200, "<html>"), "", "problem", "something else than Ray"),
        ((200, "[1]"), "", "problem", "something else than Ray"),
        ((404, ""), "", "problem", "something else than Ray"),
    ],
)
def test_a_cluster_is_asked_for_its_version(
    answer: tuple[int, str], token: str, level: str, says: str
) -> None:
    with answering({"/api/version": answer}) as server:
        found = by_name(ray_cluster.cluster(server.url, "2.60.0", token))
    assert found["Ray cluster"].level == level
    assert says in found["Ray cluster"].measured
    assert server.asked == [("/api/version", f"Bearer {token}" if token else "")]


def test_addresses_of_a_cluster_are_tried(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        current = tmp_path / "tmp/ray/ray_current_cluster"
        current.parent.mkdir(parents=True)
        current.write_text(f"{place}\n")
        for address in (place, f"ray://{place}", "auto"):
            found = by_name(ray_cluster.cluster(address, "2.60.0", "", tmp_path))
            assert found["Ray cluster"].level == "ok", address
    found = by_name(ray_cluster.cluster(place, "2.60.0", ""))
    assert found["Ray cluster"].level == "problem"
    found = by_name(ray_cluster.cluster("auto", "2.60.0", "", tmp_path / "empty"))
    assert "no cluster runs on this machine" in found["Ray cluster"].measured
    found = by_name(ray_cluster.cluster("127.0.0.1:10005", "2.60.0", ""))
    assert found["Ray port"].level == "warning"


def test_jobs_that_anybody_may_submit_are_a_problem_beyond_the_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_cluster, "is_loopback", lambda host: False)
    with answering({"/api/version": (200, '{"ray_version": "2.60.0"}')}) as server:
        assert "Ray jobs" in by_name(ray_cluster.cluster(server.url, "2.60.0", ""))
        assert "Ray jobs" not in by_name(ray_cluster.cluster(server.url, "2.60.0", "abc"))
