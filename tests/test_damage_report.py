"""The list of damaged images, on a disk that is full for a while."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_dml.damage_report import DamageReport
from dist_dml.data.damage import Damage
from dist_dml.data.index import Index
from dist_dml.data.quarantine import QuarantineEntry, read_quarantine
from dist_dml.data_config import DataConfig
from dist_dml.parallel.world import Ranks, World


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_delays_the_list_and_ends_nothing(
    divisible: Index, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = divisible.select("train")
    damage = Damage(divisible, samples, DataConfig(), 0, -100)
    world = World(Ranks(), torch.device("cpu"), None, None)
    report = DamageReport(damage, small_disk, world)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    for sample in samples[:2].tolist():
        damage.entries[sample] = QuarantineEntry.of(divisible, sample, "checksum", "it differs")
        damage.counts["checksum"] += 1
        assert report.metrics()["data/damaged/checksum"] == damage.counts["checksum"]
    (warning,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in warning
    path = small_disk / "damaged" / "worker-00000.parquet"
    assert not path.exists()
    filler.unlink()
    report.metrics()
    assert read_quarantine(path) == list(damage.entries.values())
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert capsys.readouterr().err == ""
