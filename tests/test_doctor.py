"""`dist-dml doctor`: how checks run, what is printed, exit codes, and the whole command once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_dml.cli import main
from dist_dml.config import Config
from dist_dml.credentials import expand
from dist_dml.doctor import command
from dist_dml.doctor.findings import (
    Check,
    Finding,
    Setting,
    note,
    ok,
    problem,
    run_check,
    skipped,
    warning,
)
from dist_dml.doctor.printing import counts, object_of, rows, text_of
from dist_dml.errors import UsageError
from dist_dml.parallel.world import Ranks

ROOT = Path(__file__).resolve().parents[1]
SETTING = Setting(Config(), Ranks(), {})
Find = Callable[[Setting], Iterator[Finding]]


def check_of(find: Find, seconds: float = 5.0, if_slow: str = "wait") -> Check:
    return Check("here", "thing", find, seconds, if_slow=if_slow)


def test_a_check_that_hangs_is_left_behind_with_what_it_had_found() -> None:
    gone = threading.Event()

    def find(_: Setting) -> Iterator[Finding]:
        yield ok("first part", "fine")
        gone.wait(30)
        yield ok("second part", "fine")

    def listed(setting: Setting) -> Iterator[Finding]:
        return find(setting)

    started = time.monotonic()
    found = run_check(check_of(listed, 0.2, "look at the mount"), SETTING)
    assert time.monotonic() - started < 5
    gone.set()
    assert [f.level for f in found][-1] == "warning"
    assert found[-1].measured == "no answer within 0.2 s"
    assert found[-1].remedy == "look at the mount"


@pytest.mark.parametrize(
    ("error", "level", "measured", "remedy"),
    [
        (UsageError("x=1 is wrong; set x=2"), "problem", "x=1 is wrong", "set x=2"),
        (KeyError("k"), "skipped", "the check itself failed (KeyError: 'k')", "please report it"),
    ],
)
def test_what_a_check_raises_becomes_a_finding(
    error: Exception, level: str, measured: str, remedy: str
) -> None:
    def find(_: Setting) -> Iterator[Finding]:
        raise error
        yield

    (found,) = run_check(check_of(find), SETTING)
    assert (found.level, found.measured, found.section) == (level, measured, "here")
    assert remedy in found.remedy


def test_a_finding_that_is_not_fine_has_a_remedy() -> None:
    with pytest.raises(AssertionError, match="no remedy"):
        warning("x", "bad", "")
    assert skipped("x", "nothing to look at").remedy == ""


def test_no_finding_shows_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCTOR_PASSWORD", "qz9hunter")
    expand("http://ann:${DOCTOR_PASSWORD}@host", "tracking.mlflow_uri")
    found = problem(
        "x", "http://ann:s3cret@host and qz9hunter", "ask bob:qz9hunter", text="qz9hunter"
    )
    shown = repr(found)
    assert "s3cret" not in shown
    assert "qz9hunter" not in shown
    assert "ann" in shown


def test_hosts_that_say_the_same_share_a_line() -> None:
    of_hosts = [
        Finding("disk", "ok", f"{n} MB/s", section="storage", host=f"h{n}") for n in range(5)
    ]
    odd = Finding("/dev/shm", "problem", "64 MiB", "larger", section="machine", host="h3")
    hosts = [f"h{n}" for n in range(5)]
    assert [row.hosts for row in rows([*of_hosts, odd])] == [tuple(hosts), ("h3",)]
    text = text_of([*of_hosts, odd], hosts, 10, 1.0)
    assert "10 workers on h0, h1, h2 and 2 more" in text
    assert "0 MB/s [h0; 4 more alike]" in text
    assert "[h3] 64 MiB" in text
    assert "-> larger" in text
    assert text.splitlines()[-1] == "1 problem, 1 ok; 1.0 s"
    assert len(object_of([*of_hosts, odd], hosts, 10, 1.0)["findings"]) == 6


def test_lines_are_short_and_sections_stay_together() -> None:
    found = [
        Finding("a", "ok", "word " * 60, section="one"),
        Finding("b", "ok", "x", section="two"),
        Finding("c", "note", "x", "remedy " * 40, section="one"),
    ]
    text = text_of(found, ["h"], 1, 1.0)
    assert max(map(len, text.splitlines())) <= 100
    assert text.index("\none\n") < text.index("  note ") < text.index("\ntwo\n")
    assert counts(found) == {"problem": 0, "warning": 0, "note": 1, "skipped": 0, "ok": 2}


@pytest.mark.parametrize(
    ("levels", "exit_code"),
    [(["ok", "note", "warning", "skipped"], 0), (["ok", "problem"], 1), ([], 0)],
)
def test_only_a_problem_changes_the_exit_code(
    levels: list[str],
    exit_code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make = {"ok": ok, "skipped": skipped, "note": note, "warning": warning, "problem": problem}

    def find(_: Setting) -> Iterator[Finding]:
        for level in levels:
            done = level in ("ok", "skipped")
            yield make[level]("x", "y") if done else make[level]("x", "y", "z")

    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command, "CHECKS", (check_of(find),))
    assert main(["doctor", "--json"]) == exit_code
    out, error = capsys.readouterr()
    assert json.loads(out)["exit_code"] == exit_code
    assert error == "dist-dml doctor: here\n"
    assert main(["doctor"]) == exit_code


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run.rot=x"], "did you mean run.root?"),
        (["--wait", "0"], "--wait=0: give a number of seconds above 0"),
        (["--config", "absent.yaml"], "absent.yaml cannot be read"),
        (["--mlflow", "http://ann:s3cret@host"], "--mlflow holds a password"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert says in error
    assert "s3cret" not in error
    assert error.count("\n") == 1


def test_the_whole_command_names_everything_that_is_wrong_and_goes_on(tmp_path: Path) -> None:
    """A low limit of files, a hidden package, a trap, a silent MLflow, an open token, no data."""
    token, hiding = tmp_path / "token", tmp_path / "hiding"
    token.write_text("abc")
    token.chmod(0o644)
    hiding.mkdir()
    (hiding / "webdataset.py").write_text("")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
    } | {
        "PYTHONPATH": str(hiding),
        "CUDA_LAUNCH_BLOCKING": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "DOCTOR_PASSWORD": "qz9hunter",
    }
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        words = [
            *(sys.executable, "-m", "dist_dml.doctor", "--json", f"run.root={tmp_path / 'runs'}"),
            *("--mlflow", f"http://ann:${{DOCTOR_PASSWORD}}@127.0.0.1:{port}"),
            *("--data", str(tmp_path / "absent")),
        ]
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", 'ulimit -n 300; exec "$@"', "bash", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        seconds = time.monotonic() - started
    assert done.returncode == 1, done.stderr
    assert "qz9hunter" not in done.stdout + done.stderr
    found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    levels = {name: finding["level"] for name, finding in found.items()}
    for name in ("ulimit -n", "hidden modules", "MLflow", "data"):
        assert levels[name] == "problem", found[name]
        assert found[name]["remedy"]
    # pytest's folders are closed, so that nobody reaches the token.
    assert (levels["CUDA_LAUNCH_BLOCKING"], levels["Ray token file"]) == ("warning", "warning")
    assert "no answer within 5 s" in found["MLflow"]["measured"]
    assert found["ulimit -n"]["values"]["soft"] == 300
    # What is well is said beside it, and nothing is left behind.
    assert {levels[name] for name in ("torch", "free space", "FAISS neighbours")} == {"ok"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hiding", "token"]
    assert done.stderr.split()[2] == "versions"
    assert seconds < 60  # 8 s on an idle machine.
