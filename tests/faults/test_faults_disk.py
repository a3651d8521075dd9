"""Disks that are full for a while, read-only, or plain files: real ones, mounted for a test."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from launching import Launcher, training_processes
from printed_lines import PrintedLines

pytestmark = pytest.mark.slow

STEPS = 160
TRAINING = [f"training.max_steps={STEPS}", "training.epochs=100000", "engine.threads=1"]
# No checkpoint before the end: here the disk is full for the records alone.
TRAINING += ["checkpoint.every_epochs=0", "tracking.diagnostics=false", "data.batch_size=16"]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fill(disk: Path) -> Path:
    """A file of somebody else that takes all space of a disk."""
    filler = disk / "somebody-elses-data"
    with suppress(OSError):  # The run takes some of it meanwhile: the disk is full either way.
        filler.write_bytes(bytes(shutil.disk_usage(disk).free))
    return filler


def test_records_of_a_time_with_a_full_disk_are_written_later_each_once(
    launcher: Launcher, mounted: Callable[[str], Path]
) -> None:
    undisturbed = launcher.run("by hand", 2, "run.name=undisturbed", *TRAINING)
    assert undisturbed.exit_code == 0, undisturbed.output
    disk = mounted("size=16m")
    words = ["run.name=full", f"run.root={disk}", *TRAINING]
    process, other = launcher.start("by hand", 2, *words)
    output = PrintedLines(process)
    written = disk / "full" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not written.exists() or len(records(disk / "full")) < 20:
            assert time.monotonic() < deadline, output.lines
            time.sleep(0.01)
        filler = fill(disk)
        output.until("wait in memory")
        taken = written.stat().st_size
        time.sleep(0.5)
        assert written.stat().st_size == taken  # Nothing came to the disk,
        assert process.poll() is None  # and training went on.
        filler.unlink()
        output.until("that waited are written, none is lost")
        assert output.end(90) == 0, output.lines
        assert launcher.wait([other], time.monotonic() + 30).exit_code == 0
    finally:
        for worker in training_processes(disk):
            worker.kill()
    lines = output.lines
    assert sum("wait in memory (No space left on device)" in line for line in lines) == 1
    assert not any("Traceback" in line for line in lines)
    found = records(disk / "full")
    expected = records(launcher.root / "undisturbed")
    count = Counter((r["name"], r["step"]) for r in found)
    assert set(count.values()) == {1}
    assert set(count) == {(r["name"], r["step"]) for r in expected}
    losses = {r["step"]: r["value"] for r in found if r["name"] == "train/loss"}
    assert losses == launcher.losses("undisturbed")
    assert list(losses) == list(range(1, STEPS + 1))  # In their order, too.


@pytest.mark.parametrize("kind", ["python", "by hand"])
def test_a_read_only_disk_is_refused_at_the_start(
    launcher: Launcher, mounted: Callable[[str], Path], kind: str
) -> None:
    line = refused(launcher, kind, mounted("ro,size=1m"))
    assert "Read-only file system" in line


@pytest.mark.parametrize("kind", ["python", "by hand"])
def test_a_run_root_below_a_plain_file_is_refused_at_the_start(
    launcher: Launcher, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / "runs.txt"
    file.write_text("not a folder")
    line = refused(launcher, kind, file / "runs")
    assert "Not a directory" in line
    assert file.read_text() == "not a folder"


def test_a_run_whose_disk_has_become_read_only_is_not_resumed(
    launcher: Launcher, mounted: Callable[[str], Path]
) -> None:
    disk = mounted("size=16m")
    words = [f"run.root={disk}", "run.name=run", "training.epochs=1"]
    done = launcher.run("python", 1, *words)
    assert done.exit_code == 0, done.output
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    line = refused(launcher, "python", disk, "training.epochs=2", "--resume", "auto")
    assert "Read-only file system" in line


def refused(launcher: Launcher, kind: str, root: Path, *arguments: str) -> str:
    """Start a training in `root`, check what every refusal keeps, and return its one line."""
    workers = 1 if kind == "python" else 2
    ended = launcher.run(kind, workers, f"run.root={root}", "run.name=run", *arguments)
    assert ended.exit_code == 2, ended.output
    (line,) = ended.error_lines
    assert "run.root" in line
    assert str(root) in line
    assert "Traceback" not in ended.output
    assert not training_processes(root)
    return line
