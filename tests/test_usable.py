"""Cores and memory that a process may use, in containers too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dist_dml.control_groups import allowance
from dist_dml.usable import usable_cores, usable_memory

MIB = 2**20


def group(root: Path, **files: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/\n")
    folder = root / "sys/fs/cgroup"
    folder.mkdir(parents=True)
    (folder / "cgroup.controllers").write_text("cpu memory")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return root


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("350000 100000", 3), ("50000 100000", 1), ("6400000 100000", 8)],
)
def test_cores_are_the_least_of_affinity_and_quota_in_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores(group(tmp_path, cpu_max=quota)) == cores


def test_memory_ends_where_a_container_does(tmp_path: Path) -> None:
    root = group(tmp_path, memory_max=str(512 * MIB), memory_current=str(500 * MIB))
    assert usable_memory(root) == 12 * MIB
    # What it holds of files the kernel drops first: a container that has read its data is not full.
    (root / "sys/fs/cgroup/memory.stat").write_text(f"anon 5\ninactive_file {300 * MIB}\n")
    assert usable_memory(root) == 312 * MIB


def test_a_fuller_group_around_a_small_one_counts(tmp_path: Path) -> None:
    root = group(tmp_path, memory_max=str(900 * MIB), memory_current=str(890 * MIB))
    (root / "proc/self/cgroup").write_text("0::/own\n")
    own = root / "sys/fs/cgroup/own"
    own.mkdir()
    (own / "memory.max").write_text(str(100 * MIB))
    (own / "memory.current").write_text(str(MIB))
    assert allowance(root).memory_bytes == 100 * MIB
    assert usable_memory(root) == 10 * MIB


def test_without_limits_it_is_the_machines(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available
    assert abs(usable_memory(tmp_path) - free) < 0.5 * psutil.virtual_memory().total
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.fixture
def half_a_core_more() -> Iterator[Path]:
    """A group of this system's own that allows one and a half cores."""
    top = Path("/sys/fs/cgroup")
    top = top / "cpu" if (top / "cpu").is_dir() else top
    folder = top / f"dist_dml-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"this system's control groups cannot be written: {error}")
    try:
        try:
            if (folder / "cpu.max").exists():
                (folder / "cpu.max").write_text("150000 100000")
            else:
                (folder / "cpu.cfs_period_us").write_text("100000")
                (folder / "cpu.cfs_quota_us").write_text("150000")
        except OSError as error:
            pytest.skip(f"no quota can be set: {error}")
        yield folder
    finally:
        folder.rmdir()


def test_a_real_quota_gives_the_number_of_threads(half_a_core_more: Path) -> None:
    code = (
        "import torch; from dist_dml.parallel.world import Ranks, start_world; "
        "from dist_dml.config import EngineConfig; "
        "start_world(EngineConfig(device='cpu'), Ranks()); print(torch.get_num_threads())"
    )
    words = ["bash", "-c", f'echo $$ >{half_a_core_more}/cgroup.procs; exec "$@"', "-"]
    words += [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
