"""What the doctor says of cores, memory, shared memory, files and disks, good and bad."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.control_groups import Allowance, allowance
from dist_dml.doctor import machine, storage
from dist_dml.doctor.findings import Finding, Setting
from dist_dml.parallel.world import Ranks

GIB = 2**30
BIG = 64 * GIB


def setting(*overrides: str, ranks: Ranks | None = None, system: Path = Path("/")) -> Setting:
    return Setting(resolve(None, overrides).config, ranks or Ranks(), {}, system=system)


def levels(found: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.level for finding in found}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_limits_of_version_2_are_the_least_of_all_groups_around(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory pids",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000",
            "sys/fs/cgroup/pod/memory.max": "max",
            "sys/fs/cgroup/pod/container/cpu.max": "max 100000",
            "sys/fs/cgroup/pod/container/memory.max": str(8 * GIB),
            "sys/fs/cgroup/pod/container/memory.current": str(GIB),
            "sys/fs/cgroup/pod/container/memory.events": "low 0\nhigh 0\noom 3\noom_kill 2\n",
            "sys/fs/cgroup/pod/container/pids.max": "100",
        },
    )
    assert allowance(root) == Allowance(1.5, 8 * GIB, 7 * GIB, 2, 100)


def test_limits_of_version_1_and_of_a_container_that_sees_its_own_root_only(
    tmp_path: Path,
) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/f00\n2:cpu,cpuacct:/docker/f00\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "7",
            "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\noom_kill 1",
        },
    )
    assert allowance(root) == Allowance(2.0, 4 * GIB, 4 * GIB - 7, 1, None)


def test_without_limits_or_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert allowance(tmp_path) == Allowance()
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert allowance(tmp_path) == Allowance()


def cores_of(
    affinity: int, allowed: Allowance, workers: int, *overrides: str, omp: str = ""
) -> list[Finding]:
    config = resolve(None, overrides).config
    ranks = Ranks(0, workers, 0, workers)
    environment = {"OMP_NUM_THREADS": omp} if omp else {}
    return list(machine.cores(64, affinity, allowed, config, ranks, environment))


def test_threads_follow_a_quota_below_the_machines_cores() -> None:
    (found, *_) = cores_of(64, Allowance(cores=8), 2, "data.loader_processes=0")
    assert (found.level, found.measured[-25:]) == ("ok", " 2 worker(s) of 4 threads")
    (found, *_) = cores_of(64, Allowance(cores=8), 2, "engine.threads=32")
    assert (found.level, found.remedy) == ("warning", "engine.threads=4")
    assert levels(cores_of(64, Allowance(cores=8), 2, "engine.threads=4"))["cores"] == "ok"
    assert levels(cores_of(64, Allowance(), 2))["cores"] == "ok"


def test_more_workers_or_processes_than_cores_are_named() -> None:
    (found, *_) = cores_of(2, Allowance(), 4)
    assert found.level == "warning"
    assert "at most 2 worker(s)" in found.remedy
    assert levels(cores_of(4, Allowance(), 2, "data.loader_processes=8"))["processes"] == "note"
    assert levels(cores_of(4, Allowance(), 2, omp="4"))["OMP_NUM_THREADS"] == "warning"
    assert "OMP_NUM_THREADS" not in levels(cores_of(4, Allowance(), 2, omp="2"))
    assert levels(cores_of(4, Allowance(processes=100), 1))["pids.max"] == "warning"


@pytest.mark.parametrize(
    ("available", "allowed", "workers", "level"),
    [
        (BIG, Allowance(), 8, "ok"),
        (3 * GIB, Allowance(), 2, "warning"),
        (BIG, Allowance(memory_bytes=8 * GIB, memory_free=GIB), 1, "warning"),
        (BIG, Allowance(memory_bytes=32 * GIB, memory_free=31 * GIB), 1, "note"),
    ],
)
def test_memory_is_what_the_machine_and_its_control_group_leave(
    available: int, allowed: Allowance, workers: int, level: str
) -> None:
    (found,) = machine.memory(BIG, available, allowed, workers)
    assert found.level == level


def test_processes_that_were_killed_for_memory_are_told() -> None:
    found = list(machine.memory(BIG, BIG, Allowance(killed=3), 1))
    assert levels(found) == {"memory": "ok", "killed": "warning"}
    assert "3 process(es)" in found[1].measured


def test_what_loaders_need_of_shared_memory_follows_the_configuration() -> None:
    config = resolve(
        None,
        [
            *("data.batch_size=100", "data.loader_processes=3", "data.prefetch=2"),
            *("data.image.size=32", "data.image.resize=0", "training.accumulate=2"),
        ],
    ).config
    # 13 rows a worker and micro-batch; 3 processes x (2 + 1) batches on each of 2 of 4 workers.
    assert machine.loader_bytes(config, Ranks(0, 4, 0, 2)) == 2 * 3 * 3 * 13 * 3 * 32 * 32


@pytest.mark.parametrize(
    ("total", "free", "needed", "level"),
    [
        (64 * 2**20, 64 * 2**20, 92 * 2**20, "problem"),
        (64 * 2**20, 64 * 2**20, 10 * 2**20, "warning"),
        (BIG, GIB, GIB * 3 // 4, "note"),
        (BIG, BIG, 92 * 2**20, "ok"),
    ],
)
def test_a_small_shared_memory_is_found_before_the_bus_error(
    total: int, free: int, needed: int, level: str
) -> None:
    found = machine.shared_memory(total, free, needed)
    assert found.level == level
    assert ("--shm-size" in found.remedy) == (level != "ok")


def test_an_absent_shared_memory_is_a_problem(tmp_path: Path) -> None:
    (found,) = machine.shared_memory_findings(setting(system=tmp_path))
    assert found.level == "problem"
    (there,) = machine.shared_memory_findings(setting("data.loader_processes=0"))
    assert there.values["needed"] == 0


def test_open_files_are_compared_with_what_a_training_opens() -> None:
    needed = machine.files_needed(Config(), Ranks())
    assert needed > 256  # As many tars stay open.
    hard = resource.RLIM_INFINITY
    assert machine.open_files(200, hard, needed).level == "problem"
    assert "ulimit -n 4096" in machine.open_files(200, hard, needed).remedy
    assert "hard limit" in machine.open_files(200, 300, needed).remedy
    assert machine.open_files(800, hard, needed).level == "warning"
    assert machine.open_files(1024, hard, needed).level == "ok"
    assert machine.open_files(resource.RLIM_INFINITY, hard, needed).level == "ok"


def test_adapters_need_memory_that_may_be_locked(tmp_path: Path) -> None:
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    limited = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY
    found = levels(list(machine.file_findings(setting(system=tmp_path))))
    assert ("locked memory" in found) == limited


def test_the_folder_of_runs_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = list(storage.run_root_findings(setting(f"run.root={tmp_path / 'a' / 'b'}")))
    by_name = {finding.name: finding for finding in found}
    assert by_name["writing"].values["bytes_per_second"] > 0
    assert by_name["file locks"].level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_problem() -> None:
    # Not even root makes files here.
    (found,) = storage.write_speed(Path("/proc"), "run.root=/proc")
    assert found.level == "problem"
    assert "run.root=FOLDER" in found.remedy


def test_a_file_in_place_of_the_folder_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    found = list(storage.run_root_findings(setting(f"run.root={tmp_path / 'runs'}")))
    assert levels(found) == {"run.root": "problem"}


@pytest.mark.parametrize(
    ("free", "level"), [(GIB // 2, "problem"), (5 * GIB, "note"), (50 * GIB, "ok")]
)
def test_a_full_disk_is_found(free: int, level: str) -> None:
    assert storage.space(free, 100 * GIB, "run.root=runs").level == level


def test_the_kind_of_disk_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    place = tmp_path / "with blank" / "runs"
    place.mkdir(parents=True)
    quoted = str(place.parent).replace(" ", "\\040")
    root = write(
        tmp_path / "root",
        {"proc/mounts": f"a / ext4 rw 0 0\nb {quoted} nfs4 rw 0 0\nc {place}x tmpfs rw 0 0\n"},
    )
    assert storage.file_system(place, root) == "nfs4"
    assert storage.is_network("nfs4")
    assert storage.file_system(tmp_path, root) == "ext4"
    assert storage.file_system(tmp_path, tmp_path / "absent") == ""


def test_a_disk_of_one_host_does_not_do_for_several() -> None:
    assert storage.kind_of_disk("tmpfs", Path("/x"), True).level == "problem"
    assert storage.kind_of_disk("overlay", Path("/x"), False).level == "note"
    assert storage.kind_of_disk("nfs4", Path("/x"), True).level == "ok"
