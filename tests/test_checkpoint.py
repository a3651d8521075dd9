"""Checkpoints: the same tensors on any number of workers, and no damage that goes unseen."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from checkpoint_trainee import CASES, C, assert_equal, joined, trainee
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.checkpoint_manifest import (
    Progress,
    newest_checkpoint,
    prune_checkpoints,
    read_manifest,
    verify_checkpoint,
)
from dist_dml.config_loading import config_hash, resolve
from dist_dml.errors import RunError, UsageError


def train_and_save(rank: int, size: int, group: ProcessGroup, folder: Path) -> list[Any]:
    results = []
    for case in CASES:
        worker = trainee(case, rank, size, group)
        worker.train(range(2))
        worker.save(folder / case, 2)
        results.append(worker.tensors())
    return results


def load_and_save(
    rank: int, size: int, group: ProcessGroup, source: Path, target: Path
) -> list[Any]:
    results = []
    for case in CASES:
        checkpoint = source / case / "step-000000002"
        worker = trainee(case, rank, size, group, checkpoint)
        worker.save(target / case, 2)
        results.append(worker.tensors())
    return results


def test_what_2_workers_saved_is_the_same_on_3_and_on_1(tmp_path: Path) -> None:
    saved = run_workers(train_and_save, 2, tmp_path, tmp_path / "two")
    loaded = run_workers(load_and_save, 3, tmp_path, tmp_path / "two", tmp_path / "three")
    for number, case in enumerate(CASES):
        wanted = joined([worker[number] for worker in saved])
        # 11 classes: 6 and 5 on two workers, 4, 4 and 3 on three.
        sizes = [len(worker[number]["classes"]["weight"]) for worker in (*saved, *loaded)]
        assert sizes == [6, 5, 4, 4, 3]
        states = {"sgd": {"step", "momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}
        state = states[CASES[case][0].partition("=")[2]]
        assert {n.split("|")[1] for n in wanted if n.startswith("classes weight|")} == state
        # The classes count their steps whatever the rule: stochastic rounding depends on them.
        own = state - {"step"} if "momentum_buffer" in state else state
        assert {n.split("|")[1] for n in wanted if n.startswith("optimizer")} == own
        assert wanted["classes weight"].shape == ((C, 3, 6) if case == "centres" else (C, 6))
        assert ("classes norm_mean" in wanted) == (case == "running norms")
        assert_equal(joined([worker[number] for worker in loaded]), wanted)
        # Files that two and three workers wrote, both read by one.
        for folder in ("two", "three"):
            one = trainee(case, checkpoint=tmp_path / folder / case / "step-000000002")
            assert_equal(joined([one.tensors()]), wanted)


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_bitwise_as_if_never_interrupted(case: str, tmp_path: Path) -> None:
    whole = trainee(case)
    whole.train(range(5))
    before = trainee(case)
    before.train(range(3))
    after = trainee(case, checkpoint=before.save(tmp_path, 3))
    after.train(range(3, 5))
    assert_equal(joined([after.tensors()]), joined([whole.tensors()]))


def test_a_checkpoint_before_the_first_step_can_be_loaded(tmp_path: Path) -> None:
    fresh = trainee("sgd")
    restored = trainee("sgd", checkpoint=fresh.save(tmp_path, 0))
    assert_equal(joined([restored.tensors()]), joined([fresh.tensors()]))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of checkpoints of steps 1, 2 and 3."""
    worker = trainee("adamw")
    for step in (1, 2, 3):
        worker.train(range(step - 1, step))
        worker.save(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def test_a_manifest_says_where_training_stood(saved: Path) -> None:
    manifest = verify_checkpoint(saved / "step-000000002")
    assert manifest.progress == Progress(2, 14, 1.5, 0.25, 1)
    assert manifest.plan == {"seed": 0, "fingerprint": "abc"}
    assert manifest.num_classes == C
    assert manifest.class_files == [(0, C, "classes-00000-of-00001.safetensors")]
    stored = resolve(saved / "step-000000002" / "config.yaml", []).config
    assert manifest.config_hash == config_hash(stored)
    assert set(manifest.files) | {"manifest.json"} == names(saved / "step-000000002")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_there_is_no_pickle_in_a_checkpoint(saved: Path) -> None:
    for path in (saved / "step-000000003").iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            header_bytes = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + header_bytes])
            header.pop("__metadata__", None)
            # The tensors fill the rest to the last byte: there is no room for anything else.
            ends = [entry["data_offsets"][1] for entry in header.values()]
            assert max(ends) == len(content) - 8 - header_bytes
        else:
            assert path.name in ("manifest.json", "config.yaml")
            content.decode("ascii")


FILES = [
    "embedder.safetensors",
    "optimizer.safetensors",
    "classes-00000-of-00001.safetensors",
    "config.yaml",
    "manifest.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "empty", "missing"])
def test_damage_is_refused_with_the_files_name_and_passed_over(
    name: str, damage: str, saved: Path
) -> None:
    path = saved / "step-000000003" / name
    content = path.read_bytes()
    if damage == "flipped byte":
        # In the middle of the data or, for the manifest, in the number of steps.
        place = content.index(b'"step": 3') + 8 if name == "manifest.json" else len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(UsageError) as caught:
        verify_checkpoint(path.parent)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path.parent) in message
    assert f"({name}" in message
    assert "--resume" in message
    # The one before it is whole.
    found = newest_checkpoint(saved)
    assert found is not None
    assert (found[0].name, found[1].progress.step) == ("step-000000002", 2)


@pytest.mark.parametrize(
    "text", ["[]", "3", "{}", '{"format_version": 1}', '{"format_version": 1, "files": []}', "\xff"]
)
def test_a_manifest_that_is_something_else_is_damaged(text: str, saved: Path) -> None:
    (saved / "step-000000003" / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"step-000000003 is unreadable \(manifest\.json is dam"):
        verify_checkpoint(saved / "step-000000003")


def test_another_format_version_is_refused_with_what_reads_it(saved: Path) -> None:
    path = saved / "step-000000003" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 7'))
    with pytest.raises(UsageError, match=r"has format 7, this version reads 1; resume with the"):
        read_manifest(path.parent)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"manifest\.json: No such file"):
        verify_checkpoint(tmp_path / "nothing")
    assert newest_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "step-000000001").mkdir()
    with pytest.raises(UsageError, match=r"step-000000001 is unreadable"):
        newest_checkpoint(tmp_path)


def test_another_number_of_classes_is_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match=r"has 11 classes, the data 12; .*data\.num_classes"):
        trainee("adamw", checkpoint=saved / "step-000000003", num_classes=12)


def test_a_half_written_checkpoint_is_no_checkpoint(saved: Path) -> None:
    # A run that is killed while it writes leaves this, and may leave it complete.
    (saved / "step-000000003").rename(saved / "step-000000004.tmp")
    found = newest_checkpoint(saved)
    assert found is not None
    assert found[0].name == "step-000000002"
    # The next attempt at the same step starts from nothing.
    (saved / "step-000000004.tmp" / "left over").touch()
    worker = trainee("adamw", checkpoint=found[0])
    worker.save(saved, 4)
    assert not (saved / "step-000000004.tmp").exists()
    assert names(saved / "step-000000004") == set(FILES)


def test_a_step_saved_again_replaces_the_checkpoint(saved: Path) -> None:
    worker = trainee("adamw", checkpoint=saved / "step-000000002")
    worker.train(range(7, 9))
    worker.save(saved, 3)
    assert verify_checkpoint(saved / "step-000000003")
    restored = trainee("adamw", checkpoint=saved / "step-000000003")
    assert_equal(joined([restored.tensors()]), joined([worker.tensors()]))


def test_pruning_keeps_the_newest_and_the_best(saved: Path) -> None:
    for step in (4, 5):
        shutil.copytree(saved / "step-000000003", saved / f"step-{step:09d}")
    (saved / "notes.txt").touch()
    prune_checkpoints(saved, 2, best_step=1)
    kept = {"step-000000001", "step-000000004", "step-000000005"}
    assert names(saved) == kept | {"notes.txt"}
    prune_checkpoints(saved, 5, best_step=None)
    assert names(saved) == kept | {"notes.txt"}
    prune_checkpoints(saved, 1, best_step=5)
    assert names(saved) == {"step-000000005", "notes.txt"}


def save_on_a_full_disk(
    rank: int, size: int, group: ProcessGroup, folder: Path, full_on: list[int]
) -> list[str]:
    """What each worker is told when the workers named by turns cannot write a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    worker = trainee("sgd", rank, size, group)
    worker.train(range(1))
    worker.save(folder, 1)
    told = []
    for step, full in enumerate(full_on, start=2):
        # A limit on the size of files is a full disk for one process alone.
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == full:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        try:
            worker.save(folder, step)
        except RunError as error:
            told.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    worker.save(folder, 9)
    return told


def test_a_disk_that_is_full_for_one_worker_stops_all_and_spoils_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    told = run_workers(save_on_a_full_disk, 2, tmp_path, folder, [0, 1])
    assert told[0] == told[1]
    assert len(told[0]) == 2
    for full, message in enumerate(told[0]):
        # The worker with the full disk is named, not one that only follows from it.
        assert f"the checkpoint was not written (worker {full}: " in message
        assert f"code: {errno.EFBIG}" in message or "File too large" in message
        assert "earlier checkpoints are untouched, resume with --resume auto" in message
    # Before and after: whole. In between: nothing, not even a part.
    assert names(folder) == {"step-000000001", "step-000000009"}
    for step in (1, 9):
        assert len(verify_checkpoint(folder / f"step-{step:09d}").class_files) == 2


def test_a_folder_that_cannot_be_made_stops_the_run_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"not written \(worker 0: .*Not a directory"):
        trainee("sgd").save(tmp_path / "checkpoints", 1)
