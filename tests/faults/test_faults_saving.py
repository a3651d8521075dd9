"""Checkpoints on a full disk: each failure is told, the last good one stays, training goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from launching import Launcher, training_processes
from printed_lines import PrintedLines

from dist_dml.checkpoint_manifest import checkpoint_steps, verify_checkpoint

pytestmark = pytest.mark.slow

TRAINING = ["training.epochs=36", "tracking.diagnostics=false", "data.batch_size=32"]
TRAINING += ["checkpoint.every_steps=10", "checkpoint.every_epochs=0"]


def fill(disk: Path, left: int) -> Path:
    """A file of somebody else that leaves so many bytes of a disk."""
    filler = disk / "somebody-elses-data"
    with suppress(OSError):  # The run takes some of it meanwhile.
        filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - left)))
    return filler


def failures(folder: Path) -> list[float]:
    """`checkpoint/failed` as it was recorded."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r["value"] for r in records if r["name"] == "checkpoint/failed"]


@pytest.mark.parametrize("background", [True, False])
def test_saves_that_fail_are_told_each_time_and_cost_nothing_else(
    launcher: Launcher, mounted: Callable[[str], Path], background: bool
) -> None:
    kind, workers = ("by hand", 2) if background else ("python", 1)
    whole = launcher.run(kind, workers, "run.name=whole", *TRAINING)
    assert whole.exit_code == 0, whole.output
    disk = mounted("size=24m")
    words = ["run.name=full", f"run.root={disk}", f"checkpoint.background={background}".lower()]
    process, *others = launcher.start(kind, workers, *words, *TRAINING)
    output = PrintedLines(process)
    checkpoints = disk / "full" / "checkpoints"
    deadline = time.monotonic() + 90
    while not checkpoint_steps(checkpoints):
        assert time.monotonic() < deadline, output.lines
        time.sleep(0.01)
    # A checkpoint takes 3 MiB; the records of the training still fit.
    filler = fill(disk, 2**20)
    while sum("No space left on device" in line for line in output.lines) < 3:
        assert time.monotonic() < deadline, output.lines
        assert process.poll() is None, output.lines
        time.sleep(0.01)
    good = checkpoint_steps(checkpoints)
    assert good
    for step in good:
        verify_checkpoint(checkpoints / f"step-{step:09d}")
    filler.unlink()
    assert output.end(120) == 0, output.lines
    if others:
        assert launcher.wait(others, time.monotonic() + 30).exit_code == 0
    told = [line for line in output.lines if "No space left on device" in line]
    assert all("warning: step" in line and "training goes on" in line for line in told)
    # Each step that should have been saved was told once, and counted.
    assert len(set(told)) == len(told)
    counted = failures(disk / "full")
    assert counted[-1] == len(told)
    assert counted == sorted(counted)
    assert not list(checkpoints.glob("*.tmp"))
    # Records and weights are those of a run that nothing happened to.
    launcher_on_disk = Launcher(launcher.root, disk)
    assert launcher_on_disk.losses("full") == launcher.losses("whole")
    actual, expected = launcher_on_disk.tensors("full"), launcher.tensors("whole")
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def test_a_run_whose_last_checkpoint_cannot_be_written_fails_and_goes_on_from_the_one_before(
    launcher: Launcher, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=24m")
    words = ["run.name=full", f"run.root={disk}", *TRAINING]
    (process,) = launcher.start("python", 1, *words)
    output = PrintedLines(process)
    checkpoints = disk / "full" / "checkpoints"
    deadline = time.monotonic() + 90
    while not checkpoint_steps(checkpoints):
        assert time.monotonic() < deadline, output.lines
        time.sleep(0.01)
    filler = fill(disk, 2**20)
    assert output.end(120) == 1, output.lines
    (line,) = [text for text in output.lines if text.startswith("dist_dml: error:")]
    assert "step 180: the checkpoint was not written" in line
    assert "--resume auto" in line
    assert not training_processes(disk)
    filler.unlink()
    resumed = launcher.run("python", 1, *words, "--resume", "auto")
    assert resumed.exit_code == 0, resumed.output
    assert checkpoint_steps(checkpoints)[-1] == 180
