"""The scripts of `cluster/` that decide by exit codes: real trainings, with stand-ins for Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import ROOT, Launcher, finish, free_port, plain_environment

POD = ROOT / "cluster" / "k8s" / "train_pod.sh"
BATCH = ROOT / "cluster" / "slurm" / "train.sbatch"
# Starts as many workers as SLURM_NTASKS says, tells them what a step tells its tasks, hands USR1 on
# and ends with the largest exit code, as srun does.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=$SLURM_NTASKS \\
        SLURM_STEP_NUM_NODES=1 "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
result=0
for task in "${tasks[@]}"; do
    while wait "$task"; code=$?; kill -0 "$task" 2>/dev/null; do :; done
    ((code <= result)) || result=$code
done
exit "$result"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$*" >>"$REQUEUED"; fi
"""


def wait_for_step(launcher: Launcher, name: str, processes: list[subprocess.Popen[str]]) -> None:
    """Until the run has trained some steps."""
    deadline = time.monotonic() + 120
    metrics = launcher.root / name / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("train/loss") > 3):
        ended = [one for one in processes if one.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def start_pods(launcher: Launcher, *words: str) -> list[subprocess.Popen[str]]:
    """Two pods of one worker, on the loopback."""
    given = {"NUM_PODS": "2", "WORKERS_PER_POD": "1", "MASTER_ADDR": "localhost"}
    environment = plain_environment() | given | {"MASTER_PORT": str(free_port())}
    command = ["bash", str(POD), *launcher.settings, *words]
    return [
        launcher.popen(command, environment | {"JOB_COMPLETION_INDEX": str(index)})
        for index in range(2)
    ]


@pytest.mark.slow
def test_pods_end_with_75_when_one_is_asked_to_go_and_come_back_from_there(
    launcher: Launcher,
) -> None:
    words = ["run.name=pods", "--resume", "auto"]
    pods = start_pods(launcher, *words, "training.epochs=1000")
    wait_for_step(launcher, "pods", pods)
    pods[1].send_signal(signal.SIGTERM)
    ended = [finish(pod, 60) for pod in pods]
    assert [code for code, _ in ended] == [75, 75], ended
    assert "saved step" in "".join(output for _, output in ended)
    steps = len(launcher.losses("pods"))
    again = start_pods(launcher, *words, f"training.max_steps={steps + 3}", "training.epochs=1000")
    ended = [finish(pod, 120) for pod in again]
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"from step {steps}" in "".join(output for _, output in ended)
    assert max(launcher.losses("pods")) == steps + 3


@pytest.mark.slow
def test_a_pod_ends_with_2_for_what_no_retry_mends(launcher: Launcher) -> None:
    ended = [finish(pod, 60) for pod in start_pods(launcher, "loss.name=crossentropy")]
    assert [code for code, _ in ended] == [2, 2], ended


def test_a_pod_without_its_variables_says_which() -> None:
    environment = {"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": "0"}
    done = subprocess.run(["bash", str(POD)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "NUM_PODS is not set" in done.stderr


def start_batch(
    launcher: Launcher, folder: Path, restarts: int, *words: str
) -> subprocess.Popen[str]:
    """The batch script as Slurm runs it: a copy, elsewhere, with a job's variables."""
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL), ("slurm_script", "")):
        path = folder / name
        path.write_text(content or BATCH.read_text())
        path.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1]"}
    job |= {"SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1", "SLURM_PROCID": "0"}
    job |= {"REQUEUED": str(folder / "requeued")}
    if restarts:
        job |= {"SLURM_RESTART_COUNT": str(restarts)}
    environment = plain_environment() | job
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    command = [str(folder / "slurm_script"), *launcher.settings, "run.name=batch", *words]
    return launcher.popen(command, environment)


@pytest.mark.slow
def test_a_slurm_job_is_queued_again_after_its_signal_and_goes_on(
    launcher: Launcher, tmp_path: Path
) -> None:
    requeued = tmp_path / "requeued"
    job = start_batch(launcher, tmp_path, 0, "training.epochs=1000")
    wait_for_step(launcher, "batch", [job])
    step = subprocess.run(
        ["pgrep", "-P", str(job.pid), "-f", "srun"], capture_output=True, text=True, check=True
    )
    os.kill(int(step.stdout.split()[0]), signal.SIGUSR1)
    code, output = finish(job, 60)
    assert code == 0, output
    assert "saved step" in output
    assert requeued.read_text() == "requeue 4711\n"
    steps = len(launcher.losses("batch"))
    # No `--resume auto`: the same job, started again.
    words = [f"training.max_steps={steps + 3}", "training.epochs=1000"]
    code, output = finish(start_batch(launcher, tmp_path, 1, *words), 120)
    assert code == 0, output
    assert f"from step {steps}" in output
    assert requeued.read_text() == "requeue 4711\n"
    # Another job is refused the folder; a mistake is not queued again.
    code, output = finish(start_batch(launcher, tmp_path, 0, *words), 120)
    assert code == 2, output
    assert requeued.read_text() == "requeue 4711\n"
