"""Workers that are asked to stop, killed, frozen or left alone by their launcher."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from launching import Launcher, training_processes, wait_for_no_worker
from printed_lines import PrintedLines
from shard_server import serving

from dist_dml.checkpoint_manifest import newest_checkpoint
from dist_dml.data.index_command import build_remote_index

pytestmark = pytest.mark.slow

# 5 steps an epoch, checkpoints in mid-epoch, and time to be asked before the end.
TRAINING = [
    "data.batch_size=32",
    "training.epochs=16",
    "checkpoint.every_steps=7",
    "checkpoint.every_epochs=0",
    "tracking.diagnostics=false",
]
ENOUGH = 10


def steps_done(launcher: Launcher, name: str) -> int:
    path = launcher.root / name / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [line for line in text.splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_steps(launcher: Launcher, name: str, steps: int) -> None:
    deadline = time.monotonic() + 90
    while steps_done(launcher, name) < steps:
        assert time.monotonic() < deadline, f"{name} did not come to step {steps}"
        time.sleep(0.01)


def saved_step(launcher: Launcher, name: str) -> int:
    found = newest_checkpoint(launcher.root / name / "checkpoints")
    assert found is not None
    return found[1].progress.step


def assert_same_end(launcher: Launcher, name: str, whole: str) -> None:
    assert launcher.losses(name) == launcher.losses(whole)
    actual, expected = launcher.tensors(name), launcher.tensors(whole)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize(
    ("kind", "workers", "number"),
    [("python", 1, signal.SIGTERM), ("by hand", 2, signal.SIGUSR1)],
)
def test_a_worker_that_is_asked_to_stop_saves_with_all_others_and_exits_75(
    launcher: Launcher, kind: str, workers: int, number: signal.Signals
) -> None:
    whole = launcher.run(kind, workers, "run.name=whole", *TRAINING)
    assert whole.exit_code == 0, whole.output
    processes = launcher.start(kind, workers, "run.name=asked", *TRAINING)
    wait_for_steps(launcher, "asked", ENOUGH)
    processes[-1].send_signal(number)  # One of them: the others learn of it.
    ended = launcher.wait(processes, time.monotonic() + 30)
    assert [process.returncode for process in processes] == [75] * workers, ended.output
    assert not ended.error_lines
    assert "Traceback" not in ended.output
    step = saved_step(launcher, "asked")
    assert f"saved step {step} of 80" in ended.output
    # Nothing was lost: the checkpoint is of the last step that was made.
    assert step == steps_done(launcher, "asked")
    events = (launcher.root / "asked" / "artifacts.jsonl").read_text()
    assert '"KILLED"' in events

    resumed = launcher.run(kind, workers, "run.name=asked", "--resume", "auto", *TRAINING)
    assert resumed.exit_code == 0, resumed.output
    assert_same_end(launcher, "asked", "whole")


@pytest.mark.parametrize("kind", ["torchrun", "deepspeed"])
def test_a_launcher_that_is_asked_to_stop_leaves_a_saved_run_and_no_worker(
    launcher: Launcher, kind: str
) -> None:
    (process,) = launcher.start(kind, 2, "run.name=asked", *TRAINING, "training.epochs=400")
    wait_for_steps(launcher, "asked", ENOUGH)
    process.send_signal(signal.SIGTERM)
    # torchrun answers 1 whatever its workers do; DeepSpeed dies of the signal.
    ended = launcher.wait([process], time.monotonic() + 40)
    assert ended.exit_code in (1, signal.SIGTERM), ended.output
    wait_for_no_worker(launcher.root)
    step = saved_step(launcher, "asked")
    assert "start again with --resume auto" in ended.output
    assert step == steps_done(launcher, "asked")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_ends_the_other_within_30_s_with_the_reason(
    launcher: Launcher, victim: int
) -> None:
    processes = launcher.start("by hand", 2, "run.name=killed", *TRAINING, "training.epochs=400")
    wait_for_steps(launcher, "killed", ENOUGH)
    processes[victim].kill()
    ended = launcher.wait(processes, time.monotonic() + 30)
    assert processes[1 - victim].returncode == 1, ended.output
    (line,) = ended.error_lines
    assert re.search(r"it was killed(,| or) .*failed; look at its own output", line)
    assert "--resume auto" in line
    assert not training_processes(launcher.root)


def test_a_requeued_slurm_job_goes_on_by_itself_and_another_job_does_not(
    launcher: Launcher,
) -> None:
    whole = launcher.run("python", 1, "run.name=whole", *TRAINING)
    assert whole.exit_code == 0, whole.output
    # Slurm's own launcher: one task of a step.
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}

    def job(**more: str) -> subprocess.Popen[str]:
        words = ["run.name=job", *TRAINING]
        (process,) = launcher.start("python", 1, *words, variables=slurm | more)
        return process

    first = job()
    wait_for_steps(launcher, "job", ENOUGH)
    for process in [first, *training_processes(launcher.root)]:
        process.kill()  # As a node that goes down.
    launcher.wait([first], time.monotonic() + 30)
    other = launcher.wait([job(SLURM_JOB_ID="4712")], time.monotonic() + 60)
    assert other.exit_code == 2
    assert "holds a run already" in other.output
    again = launcher.wait([job(SLURM_RESTART_COUNT="1")], time.monotonic() + 90)
    assert again.exit_code == 0, again.output
    assert_same_end(launcher, "job", "whole")


WATCHED = ["engine.slow_seconds=1.5", "training.epochs=400"]


def frozen(launcher: Launcher) -> psutil.Process:
    """The last worker started by hand, stopped as by a debugger, a full swap or a dead disk."""
    victim = max(training_processes(launcher.root), key=lambda process: process.pid)
    victim.suspend()
    return victim


def test_a_worker_that_hangs_is_named_and_the_run_goes_on_when_it_does(launcher: Launcher) -> None:
    processes = launcher.start("by hand", 2, "run.name=slow", *TRAINING, *WATCHED)
    outputs = [PrintedLines(process) for process in processes]
    wait_for_steps(launcher, "slow", ENOUGH)
    victim = frozen(launcher)
    outputs[0].until("dist_dml: warning:")
    (line,) = [text for text in outputs[0].lines if "dist_dml: warning:" in text]
    assert "worker 1 says nothing: stopped, cut off, or its machine is gone" in line
    assert "worker 0 waits for it" in line
    before = steps_done(launcher, "slow")
    assert f"step {before + 1} has taken" in line
    victim.resume()
    wait_for_steps(launcher, "slow", before + ENOUGH)
    processes[0].terminate()
    assert [output.end(30) for output in outputs] == [75, 75]


def test_a_worker_that_hangs_for_good_ends_all_with_its_name(launcher: Launcher) -> None:
    limit = "engine.timeout_seconds=8"
    processes = launcher.start("by hand", 2, "run.name=stuck", *TRAINING, *WATCHED, limit)
    wait_for_steps(launcher, "stuck", ENOUGH)
    victim = frozen(launcher)
    try:
        ended = launcher.wait(processes[:1], time.monotonic() + 30)
    finally:
        victim.resume()
    assert ended.exit_code == 1
    (line,) = ended.error_lines
    assert "worker 1 says nothing" in line
    assert "engine.timeout_seconds" in line
    # Set free, it learns that the run is over.
    assert launcher.wait(processes[1:], time.monotonic() + 30).exit_code != 0
    assert saved_step(launcher, "stuck") % 7 == 0


def test_a_store_that_does_not_answer_is_named_as_data_and_where(
    launcher: Launcher, data: Path, tmp_path: Path
) -> None:
    with serving() as server:
        for path in data.glob("*.tar"):
            server.files[path.name] = path.read_bytes()
        remote = build_remote_index(f"{server.url}/*.tar", tmp_path / "remote", processes=1)
        for name in server.files:
            server.faults[name].append(("stall", 5.0))
        words = [f"data.path={remote.folder}", f"data.storage={{cache: {tmp_path / 'cache'}}}"]
        (process,) = launcher.start("python", 1, "run.name=far", *TRAINING, *WATCHED, *words)
        output = PrintedLines(process)
        output.until("dist_dml: warning:")
        (line,) = [text for text in output.lines if "dist_dml: warning:" in text]
        assert "step 1 has taken" in line
        assert "worker 0 (" in line
        assert ") is in data (dist_dml/data/" in line
        # A slow store is no fault: the run goes on.
        wait_for_steps(launcher, "far", ENOUGH)
        process.terminate()
        assert output.end(30) == 75
