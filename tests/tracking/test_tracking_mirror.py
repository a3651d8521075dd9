"""The mirror process: beside a trainer, before a server that hangs, after the trainer's death."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import dist_dml
from dist_dml.config import TrackingConfig
from dist_dml.tracking import load_sampler, mirror_process, run_files
from dist_dml.tracking.mirror import start_mirror
from dist_dml.tracking.recorder import Recorder, read_metrics

TRAINER = """
import sys, time
from pathlib import Path
from dist_dml.config import TrackingConfig
from dist_dml.tracking.mirror import start_mirror
from dist_dml.tracking.recorder import Recorder

folder = Path(sys.argv[1])
recorder = Recorder(folder)
mirror = start_mirror(folder, TrackingConfig(), folder.parent, folder.name)
recorder.record(1, 128, 0.1, {"train/loss": 3.0})
print(mirror.process.pid, flush=True)
time.sleep(600)
"""


def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {name: a}\n")
    return folder


def rows(root: Path, query: str) -> list[tuple]:
    """The answer of the database itself. Importing MLflow here would take seconds."""
    with sqlite3.connect(root / "mlflow.db") as database:
        answer = database.execute(query).fetchall()
    database.close()
    return answer


def losses(root: Path) -> list[tuple]:
    return rows(root, "select step, value from metrics where key = 'train/loss' order by step")


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_run_is_in_mlflow_when_finish_returns(tmp_path):
    folder = run_folder(tmp_path)
    recorder = Recorder(folder)
    started = time.monotonic()
    mirror = start_mirror(folder, TrackingConfig(), folder.parent, "a")
    assert time.monotonic() - started < 1.0
    for step in range(1, 101):
        recorder.record(step, step, step / 10, {"train/loss": 1 / step})
    recorder.note_end("FINISHED")
    recorder.close()
    assert mirror.finish(60.0) is None
    assert losses(folder.parent) == [(step, 1 / step) for step in range(1, 101)]
    assert rows(folder.parent, "select status, name from runs") == [("FINISHED", "a")]
    assert (folder / "mlflow.log").read_text() == ""


@pytest.mark.slow
def test_a_server_that_never_answers_blocks_neither_records_nor_the_end(tmp_path):
    folder = run_folder(tmp_path)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        # Connections are accepted by the kernel, and no byte ever comes back.
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        recorder = Recorder(folder)
        mirror = start_mirror(folder, TrackingConfig(mlflow_uri=uri), folder.parent, "a")
        server.settimeout(60.0)
        connection, _ = server.accept()  # The mirror is now waiting for an answer.
        slowest = 0.0
        for step in range(1, 201):
            started = time.perf_counter()
            recorder.record(step, step, step / 10, {"train/loss": 1 / step})
            slowest = max(slowest, time.perf_counter() - started)
        assert slowest < 0.1
        recorder.note_end("FINISHED")
        recorder.close()
        started = time.monotonic()
        problem = mirror.finish(2.0)
        assert time.monotonic() - started < 4.0
        connection.close()
    assert problem is not None
    assert "\n" not in problem
    assert f"dist-dml track sync {folder}" in problem
    assert mirror.process is not None
    assert mirror.process.poll() is not None

    # In a process of its own, as a user would, against a store that works.
    code = f"""
import sys
from pathlib import Path
from dist_dml.tracking import sync_command
sync_command.sync(Path({str(folder)!r}), {f"sqlite:///{folder.parent}/mlflow.db"!r}, None, None)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=60)
    assert losses(folder.parent) == [(step, 1 / step) for step in range(1, 201)]
    assert rows(folder.parent, "select status from runs") == [("FINISHED",)]


@pytest.mark.slow
def test_the_mirror_ends_after_its_trainer_is_killed_and_says_so(tmp_path):
    folder = run_folder(tmp_path)
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(folder)], stdout=subprocess.PIPE, env=environment()
    )
    assert trainer.stdout is not None
    mirror = psutil.Process(int(trainer.stdout.readline()))
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    assert wait_until(lambda: not mirror.is_running(), 30.0)
    assert run_files.last_status(folder)["status"] == "KILLED"
    assert losses(folder.parent) == [(1, 3.0)]
    assert rows(folder.parent, "select status from runs") == [("KILLED",)]


def test_a_mirror_that_hangs_in_a_call_is_ended_at_its_deadline(tmp_path):
    folder = run_folder(tmp_path)
    attempt = run_files.start_attempt(folder)
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-m", "dist_dml.tracking.mirror_process", str(folder)]
        command += ["--uri", f"http://127.0.0.1:{server.getsockname()[1]}", "--experiment", "e"]
        command += ["--run-name", "a", "--attempt", attempt, "--parent-pid", str(os.getpid())]
        command += ["--flush-seconds", "1"]
        process = subprocess.Popen(command, env=environment())
        server.settimeout(60.0)
        connection, _ = server.accept()
        run_files.append_event(folder, {"status": "FAILED", "time": time.time()})
        started = time.monotonic()
        code = process.wait(30)
        assert time.monotonic() - started < 5.0  # The call itself would wait for 10 s, twice.
        connection.close()
    assert code == mirror_process.EXIT_INCOMPLETE
    assert "given up" in (folder / "mlflow.log").read_text()


def test_a_mirror_of_an_earlier_attempt_leaves_the_run_to_the_later_one(tmp_path):
    folder = run_folder(tmp_path)
    earlier = run_files.start_attempt(folder)
    later = run_files.start_attempt(folder)
    command = [sys.executable, "-m", "dist_dml.tracking.mirror_process", str(folder)]
    command += ["--uri", f"sqlite:///{folder.parent}/mlflow.db", "--experiment", "e"]
    command += ["--run-name", "a", "--attempt", earlier, "--parent-pid", "0"]
    command += ["--artifact-root", str(tmp_path / "artifacts")]
    subprocess.run(command, env=environment(), timeout=30, check=True)
    status = run_files.last_status(folder)
    assert (status["status"], status["attempt"]) == ("RUNNING", later)
    assert not (folder.parent / "mlflow.db").exists()


def test_the_load_of_the_machine_is_recorded_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(load_sampler, "SYSTEM_SECONDS", 0.05)
    folder = run_folder(tmp_path)
    sampler = load_sampler.LoadSampler(folder)
    time.sleep(0.1)
    assert sampler.sample_when_due()
    metrics = read_metrics(folder, run_files.SYSTEM)
    assert 0 < metrics["system/system_memory_usage_percentage"].value[0] <= 100
    assert "system/cpu_utilization_percentage" in metrics
    assert read_metrics(folder) == {}


def test_another_machines_load_has_a_file_and_names_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(load_sampler, "SYSTEM_SECONDS", 0.05)
    folder = run_folder(tmp_path)
    run_files.identify_run(folder, {})
    sampler = load_sampler.LoadSampler(folder, 2)
    time.sleep(0.1)
    assert sampler.sample_when_due()
    assert run_files.system_files(folder) == ["system.jsonl", "system-2.jsonl"]
    assert all(name.startswith("system/node_2/") for name in read_metrics(folder, "system-2.jsonl"))
    assert "system/node_2/cpu_utilization_percentage" in read_metrics(folder, "system-2.jsonl")


def test_the_process_of_another_machine_waits_for_the_run_and_ends_when_told(tmp_path):
    folder = run_folder(tmp_path)
    process = load_sampler.start_load_sampler(folder, 1)
    assert process is not None
    try:
        time.sleep(1.0)
        assert process.poll() is None
        assert not (folder / "run.json").exists()  # The first worker alone gives identities.
    finally:
        load_sampler.stop_load_sampler(process)
    assert process.returncode == -signal.SIGTERM


def test_the_process_of_another_machine_ends_with_its_worker(tmp_path):
    folder = run_folder(tmp_path)
    text = (
        "from pathlib import Path; from dist_dml.tracking.load_sampler import start_load_sampler; "
        f"print(start_load_sampler(Path({str(folder)!r}), 1).pid)"
    )
    worker = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True, env=environment()
    )
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(worker.stdout)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(worker.stdout))


def environment() -> dict[str, str]:
    checkout = str(Path(dist_dml.__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": checkout, "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
