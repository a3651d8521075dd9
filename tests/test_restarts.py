"""Which launch is the same one again, and who may write a run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_dml.errors import Stopped, UsageError
from dist_dml.restarts import launch_identity, restart_count
from dist_dml.run_lock import RunLock
from dist_dml.skipped_batches import roll_back, skipped_steps
from dist_dml.stop_request import StopRequest, deepspeed_launchers

VARIABLES = (
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_without_a_launcher_is_never_a_restart() -> None:
    assert restart_count() == 0
    assert launch_identity() == ""


@pytest.mark.parametrize(
    ("variables", "count", "identity"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "job7", "TORCHELASTIC_RESTART_COUNT": "0"},
            0,
            "torchelastic job7",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "job7", "TORCHELASTIC_RESTART_COUNT": "2"},
            2,
            "torchelastic job7",
        ),
        ({"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "1"}, 1, "slurm 41"),
        ({"SLURM_JOB_ID": "41"}, 0, "slurm 41"),
        # torchrun inside a Slurm job without a rendezvous id: the job tells launches apart.
        ({"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "41"}, 0, "slurm 41"),
        ({"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "soon"}, 0, "slurm 41"),
    ],
)
def test_launchers_say_how_often_and_which(
    variables: dict[str, str], count: int, identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert restart_count() == count
    assert launch_identity() == identity


def test_torchruns_without_an_id_are_told_apart_by_their_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch_identity().endswith(f" {os.getppid()}")


def holder_of(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a run folder until it is killed."""
    code = (
        "import sys, time; from pathlib import Path; from dist_dml.run_lock import RunLock\n"
        "lock = RunLock(); lock.acquire(Path(sys.argv[1])); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_folder_in_use_is_refused_with_who_uses_it_until_that_one_dies(
    tmp_path: Path,
) -> None:
    process = holder_of(tmp_path)
    lock = RunLock()
    try:
        with pytest.raises(UsageError, match=rf"in use by process {process.pid} on .*run\.name"):
            lock.acquire(tmp_path, patience_seconds=0)
    finally:
        process.kill()
        process.communicate()
    lock.acquire(tmp_path, patience_seconds=10)
    lock.acquire(tmp_path, patience_seconds=0)  # Its own.
    other = RunLock()
    with pytest.raises(UsageError, match=rf"process {os.getpid()} on"):
        other.acquire(tmp_path, patience_seconds=0)
    lock.release()
    other.acquire(tmp_path, patience_seconds=0)
    other.release()


def test_a_request_before_there_is_anything_to_save_ends_the_process_at_once() -> None:
    request = StopRequest()
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    try:
        request.install()
        with pytest.raises(Stopped, match="SIGUSR1 came before the first step"):
            os.kill(os.getpid(), signal.SIGUSR1)
        # Caught by somebody on the way: still not forgotten.
        with pytest.raises(Stopped, match="before the first step"):
            request.hold()
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_a_request_during_training_waits_for_the_step_and_is_heard_once() -> None:
    request = StopRequest()
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    try:
        request.install()
        request.hold()
        assert not request.is_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.is_asked()
        assert request.name == "SIGTERM"
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_a_shell_or_a_test_runner_is_no_launcher_to_outlive() -> None:
    assert deepspeed_launchers() == []


def checkpoints(folder: Path, *steps: int) -> list[str]:
    for step in steps:
        (folder / "checkpoints" / f"step-{step:09d}").mkdir(parents=True)
    return [path.name for path in sorted((folder / "checkpoints").glob("*"))]


@pytest.mark.parametrize(
    ("num_checkpoints", "left", "place"),
    [
        (1, [4, 8, 12], "the checkpoint of step 12"),
        (2, [4, 8], "the checkpoint of step 8"),
        (3, [4], "the checkpoint of step 4"),
        (4, [], "the start"),
    ],
)
def test_going_back_leaves_the_nth_newest_checkpoint_as_the_newest(
    num_checkpoints: int, left: list[int], place: str, tmp_path: Path
) -> None:
    checkpoints(tmp_path, 4, 8, 12)
    assert skipped_steps(tmp_path) == ()
    assert roll_back(tmp_path, 14, num_checkpoints) == place
    assert checkpoints(tmp_path) == [f"step-{step:09d}" for step in left]
    assert skipped_steps(tmp_path) == (14,)
    roll_back(tmp_path, 9, 1)
    assert skipped_steps(tmp_path) == (9, 14)


@pytest.mark.parametrize("text", ["", "[]", '{"steps": 3}', '{"steps": ["a"]}', "\x00"])
def test_a_damaged_list_of_passed_over_batches_counts_as_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "skipped.json").write_text(text)
    assert skipped_steps(tmp_path) == ()
