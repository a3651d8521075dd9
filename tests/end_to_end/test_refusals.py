"""What cannot work is refused before work starts: one line, an exit code, nobody left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Launcher, training_processes

from dist_dml.data.index import load_index
from dist_dml.data.pack.folder import pack_folder

pytestmark = pytest.mark.slow


def refused(
    launcher: Launcher, *arguments: str, kind: str = "by hand", workers: int = 2, code: int = 2
) -> str:
    """Run, check what every refusal must keep, and return the one line."""
    finished = launcher.run(kind, workers, "run.name=bad", *arguments, timeout_seconds=60)
    assert finished.exit_code != 0, finished.output
    if kind in ("python", "by hand"):  # torchrun and deepspeed end with 1, whatever a worker says.
        assert finished.exit_code == code, finished.output
    assert len(finished.error_lines) == 1, finished.output
    assert 'File "' + os.sep not in finished.output.split("dist_dml: error:")[0], finished.output
    assert finished.seconds < 30
    assert not training_processes(launcher.root)
    return finished.error_lines[0]


def test_a_typo_in_a_key(launcher: Launcher) -> None:
    line = refused(launcher, "optimizer.learning_rte=0.1")
    assert "did you mean optimizer.learning_rate?" in line


def test_a_label_outside_the_classes(launcher: Launcher) -> None:
    line = refused(launcher, "data.num_classes=7", kind="by hand")
    assert "outside the classifier's 0..6" in line
    assert "key" in line


def test_more_classes_than_memory(launcher: Launcher) -> None:
    line = refused(launcher, "data.num_classes=30000000000", kind="by hand")
    assert "GiB for its 15000000000 classes (weights" in line
    assert "2 worker(s) share" in line
    assert "classes.weight_dtype=bfloat16" in line


def test_what_a_class_parallel_step_cannot_do(launcher: Launcher) -> None:
    for arguments, text in {
        ("loss.tile_mebibytes=0.01",): "loss.tile_mebibytes=0.01",
        ("classes.backend=triton",): "classes.backend=triton cannot run",
        ("classes.backend=native", "loss={name: l1}"): "classes.backend=native cannot run",
        ("classes.sample=random", "loss.label_smoothing=0.1"): "set loss.label_smoothing=0",
        ("classes.sample=random", "training.accumulate=2"): "training.accumulate=1",
        ("classes.sample_rate=0.5",): "classes.sample=random",
        ("classes.weight_dtype=float16",): "classes.weight_dtype",
    }.items():
        assert text in refused(launcher, *arguments, kind="by hand"), arguments


def test_a_missing_and_an_empty_shard_folder(launcher: Launcher, tmp_path: Path) -> None:
    assert "nowhere" in refused(launcher, f"data.path={tmp_path}/nowhere", kind="by hand")
    (tmp_path / "empty").mkdir()
    assert "dist-dml" in refused(launcher, f"data.path={tmp_path}/empty")


def test_fewer_classes_than_workers(launcher: Launcher, tmp_path: Path, data: Path) -> None:
    source = data.parent / "source"
    for name in ("class00", "class01", "class02"):
        shutil.copytree(source / name, tmp_path / "few" / name)
    pack_folder(tmp_path / "few", tmp_path / "packed", test_fraction=0.34, processes=1)
    line = refused(launcher, f"data.path={tmp_path}/packed", kind="by hand", workers=3)
    assert "2 classes for 3 workers" in line


def test_fewer_rows_than_workers(launcher: Launcher) -> None:
    line = refused(launcher, "data.batch_size=2", kind="by hand", workers=3)
    assert "data.batch_size=2" in line


def test_an_unreadable_checkpoint(launcher: Launcher) -> None:
    arguments = ["training.max_steps=2", "checkpoint.keep_last=1"]
    assert launcher.run("python", 1, "run.name=bad", *arguments).exit_code == 0
    (checkpoint,) = (launcher.root / "bad" / "checkpoints").glob("step-*")
    path = checkpoint / "embedder.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for resume in ("auto", str(checkpoint)):
        line = refused(launcher, *arguments, "--resume", resume, kind="by hand")
        assert "embedder.safetensors" in line
        assert "checksum" in line
    # Nothing written is lost: the damaged checkpoint is still there to be looked at.
    assert path.read_bytes() == bytes(content)


def test_resuming_with_another_optimizer_or_bias_or_batch(launcher: Launcher) -> None:
    assert launcher.run("python", 1, "run.name=bad", "training.max_steps=1").exit_code == 0
    arguments = ["--resume", "auto", "training.max_steps=2"]
    for change, key in {
        "optimizer={name: adamw}": "optimizer.name 'sgd' -> 'adamw'",
        "loss.bias=false": "loss.bias True -> False",
        "data.batch_size=64": "batch_size 128 -> 64",
        "run.seed=3": "seed 0 -> 3",
    }.items():
        assert key in refused(launcher, *arguments, change, kind="python", workers=1)


def test_a_damaged_image_met_by_one_worker_ends_all_and_is_named(
    launcher: Launcher, tmp_path: Path, data: Path
) -> None:
    shutil.copytree(data, tmp_path / "damaged")
    index = load_index(tmp_path / "damaged")
    sample = int(index.select("train")[5])
    shard = index.shard_path(int(index.shard[sample]))
    content = bytearray(shard.read_bytes())
    content[int(index.offset[sample]) + 20] ^= 1
    shard.write_bytes(content)
    arguments = [f"data.path={tmp_path}/damaged", "data.strict=true"]
    line = refused(launcher, *arguments, kind="by hand", workers=3, code=1)
    assert shard.name in line
    assert index.key(sample) in line


def test_a_run_folder_that_is_taken(launcher: Launcher) -> None:
    assert launcher.run("python", 1, "run.name=bad", "training.max_steps=1").exit_code == 0
    before = (launcher.root / "bad" / "metrics.jsonl").read_bytes()
    assert "--resume auto" in refused(launcher, "training.max_steps=1")
    assert (launcher.root / "bad" / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB, mounted for this test; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kibibytes_left", [0, 100])
def test_a_full_disk_at_the_start(
    launcher: Launcher, small_disk: Path, kibibytes_left: int
) -> None:
    """Too full for the first file, and full enough for that but not for a checkpoint."""
    filler = small_disk / "filler"
    size = shutil.disk_usage(small_disk).free - kibibytes_left * 1024
    filler.write_bytes(bytes(size))
    line = refused(launcher, f"run.root={small_disk}", kind="by hand")
    assert "free" in line
    assert "run.root" in line
    assert filler.stat().st_size == size


def test_a_best_metric_that_is_not_measured(launcher: Launcher) -> None:
    line = refused(launcher, "checkpoint.best_metric=unseen/cosine/map_at_rr", kind="by hand")
    assert "unseen/cosine/map_at_r" in line


def test_a_backbone_that_does_not_exist(launcher: Launcher) -> None:
    assert "model.backbone" in refused(launcher, "model.backbone=timm:resnet5O")


def test_a_diverging_run_stops_with_the_step_and_saves_no_broken_checkpoint(
    launcher: Launcher,
) -> None:
    arguments = ["training.max_steps=30", "optimizer.learning_rate=1e30", "data.batch_size=32"]
    line = refused(launcher, *arguments, kind="by hand", code=1)
    assert "the loss of step" in line
    assert not list((launcher.root / "bad" / "checkpoints").glob("step-*"))
