"""A run killed in mid-epoch and resumed ends like one that was never killed."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from launching import Launcher, training_processes

pytestmark = pytest.mark.slow

# 5 steps an epoch (the last batch is short) and checkpoints every 4: most lie in mid-epoch.
TRAINING = [
    "data.batch_size=32",
    "training.epochs=8",
    "checkpoint.every_steps=4",
    "checkpoint.every_epochs=0",
]
KILL_AFTER_STEP = 10


def last_step(root: Path, name: str) -> int:
    """The last step on record."""
    path = root / name / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.parametrize(
    ("kind", "workers", "extra"),
    [
        ("python", 1, []),
        ("by hand", 3, []),
        ("deepspeed by hand", 2, ["engine.zero_stage=2"]),
    ],
)
def test_killed_and_resumed_ends_bitwise_equal_to_the_uninterrupted_run(
    launcher: Launcher, kind: str, workers: int, extra: list[str]
) -> None:
    arguments = [*TRAINING, *extra]
    whole = launcher.run(kind, workers, "run.name=whole", *arguments)
    assert whole.exit_code == 0, whole.output
    total = max(launcher.losses("whole"))

    processes = launcher.start(kind, workers, "run.name=killed", *arguments)
    deadline = time.monotonic() + 90
    while last_step(launcher.root, "killed") < KILL_AFTER_STEP:
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.01)
    victim = max(training_processes(launcher.root), key=lambda process: process.pid)
    victim.send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    ended = launcher.wait(processes, killed_at + 30)
    assert ended.exit_code != 0
    assert not training_processes(launcher.root), "a worker was left behind"
    assert max(launcher.losses("killed")) < total, "it was killed too late to show anything"

    resumed = launcher.run(kind, workers, "run.name=killed", "--resume", "auto", *arguments)
    assert resumed.exit_code == 0, resumed.output
    assert launcher.losses("killed") == launcher.losses("whole")
    expected = launcher.tensors("whole")
    actual = launcher.tensors("killed")
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_a_checkpoint_of_two_workers_goes_on_with_one_and_with_another_engine(
    launcher: Launcher,
) -> None:
    whole = launcher.run("python", 1, "run.name=whole", *TRAINING)
    assert whole.exit_code == 0, whole.output
    first = launcher.run(
        "deepspeed by hand",
        2,
        "run.name=moved",
        *TRAINING,
        "engine.zero_stage=2",
        "training.max_steps=14",
    )
    assert first.exit_code == 0, first.output
    second = launcher.run(
        "by hand", 3, "run.name=moved", *TRAINING, "--resume", "auto", "training.max_steps=25"
    )
    assert second.exit_code == 0, second.output
    third = launcher.run("python", 1, "run.name=moved", *TRAINING, "--resume", "auto")
    assert third.exit_code == 0, third.output
    steps = list(launcher.losses("whole"))
    # The cosine follows the length of the run, which these three were told differently.
    assert list(launcher.losses("moved")) == steps
