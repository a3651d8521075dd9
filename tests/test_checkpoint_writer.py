"""Checkpoints that are written while training goes on, and layouts of 1 to 5 workers."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_trainee import C, assert_equal, joined, trainee
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml import checkpoint_writer
from dist_dml.checkpoint_manifest import checkpoint_steps, newest_checkpoint
from dist_dml.checkpoint_writer import CheckpointWriter
from dist_dml.config import CheckpointConfig
from dist_dml.parallel.world import World

CONFIG = CheckpointConfig(keep_last=2)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A slow disk: nothing is written before the event is set."""
    genuine, go_on = checkpoint_writer.write_snapshot, threading.Event()

    def wait_and_write(*arguments: Any) -> Path:
        assert go_on.wait(30)
        return genuine(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_snapshot", wait_and_write)
    return go_on


@pytest.mark.parametrize("case", ["sgd", "adamw"])
def test_what_is_written_is_the_state_of_the_save_and_not_of_later_steps(
    case: str, held: threading.Event, tmp_path: Path
) -> None:
    worker = trainee(case)
    worker.train(range(2))
    wanted = joined([worker.tensors()])
    writer = CheckpointWriter(tmp_path, CONFIG, worker.world)
    writer.save(worker.contents(2), worker.engine, worker.classifier)
    worker.train(range(2, 5))
    assert not writer.news()
    held.set()
    writer.wait()
    (saved,) = writer.news()
    assert (saved.step, saved.problem) == (2, "")
    assert saved.blocked_seconds < saved.seconds
    assert not writer.news()
    restored = trainee(case, checkpoint=tmp_path / "step-000000002")
    assert_equal(joined([restored.tensors()]), wanted)
    # The same copies serve the next save.
    now = joined([worker.tensors()])
    writer.save(worker.contents(5), worker.engine, worker.classifier)
    writer.wait()
    restored = trainee(case, checkpoint=tmp_path / "step-000000005")
    assert_equal(joined([restored.tensors()]), now)


def test_in_the_foreground_nothing_is_copied_and_the_training_waits(tmp_path: Path) -> None:
    worker = trainee("sgd")
    config = CheckpointConfig(background=False)
    writer = CheckpointWriter(tmp_path, config, worker.world)
    writer.save(worker.contents(0), worker.engine, worker.classifier)
    (saved,) = writer.news()
    assert saved.blocked_seconds == saved.seconds
    assert checkpoint_steps(tmp_path) == [0]


def test_a_save_waits_for_the_one_before_and_the_oldest_go(tmp_path: Path) -> None:
    worker = trainee("sgd")
    writer = CheckpointWriter(tmp_path, CONFIG, worker.world)
    for step in range(1, 6):
        writer.save(worker.contents(step), worker.engine, worker.classifier)
    writer.wait()
    assert [saved.step for saved in writer.news()] == [1, 2, 3, 4, 5]
    # The contents say that step 1 was the best.
    assert checkpoint_steps(tmp_path) == [1, 4, 5]


def test_a_save_that_fails_says_why_and_the_next_one_is_made(tmp_path: Path) -> None:
    worker = trainee("sgd")
    folder = tmp_path / "checkpoints"
    folder.write_text("a file where the folder should be")
    writer = CheckpointWriter(folder, CONFIG, worker.world)
    writer.save(worker.contents(1), worker.engine, worker.classifier)
    writer.wait()
    (saved,) = writer.news()
    assert "the checkpoint was not written (worker 0: " in saved.problem
    folder.unlink()
    writer.save(worker.contents(2), worker.engine, worker.classifier)
    writer.wait()
    assert [saved.problem for saved in writer.news()] == [""]
    assert checkpoint_steps(folder) == [2]


def save_while_training(
    rank: int, size: int, group: ProcessGroup, folder: Path
) -> dict[str, dict[str, Tensor]]:
    """Five saves in a row, messages of both groups under way at the same time."""
    worker = trainee("adamw", rank, size, group)
    background = dist.new_group(backend="gloo", timeout=timedelta(seconds=30))
    assert isinstance(background, ProcessGroup)
    old = worker.world
    world = World(old.ranks, old.device, old.group, None, background=background)
    writer = CheckpointWriter(folder, CONFIG, world)
    for step in range(1, 6):
        worker.train(range(step - 1, step))
        writer.save(worker.contents(step), worker.engine, worker.classifier)
    tensors = worker.tensors()
    worker.train(range(5, 8))
    writer.wait()
    assert [saved.problem for saved in writer.news()] == [""] * 5
    return tensors


def load(rank: int, size: int, group: ProcessGroup, folder: Path) -> dict[str, dict[str, Tensor]]:
    found = newest_checkpoint(folder)
    assert found is not None
    return trainee("adamw", rank, size, group, found[0]).tensors()


def logits(tensors: dict[str, Tensor]) -> Tensor:
    """Of some rows against all classes, by one product whatever the layout was."""
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    return rows @ tensors["classes weight"].T


def test_what_4_workers_saved_gives_identical_logits_on_1_2_3_and_5(tmp_path: Path) -> None:
    wanted = joined(run_workers(save_while_training, 4, tmp_path, tmp_path / "saved"))
    assert wanted["classes weight"].shape == (C, 6)
    for size in (2, 3, 5):
        found = joined(run_workers(load, size, tmp_path, tmp_path / "saved"))
        assert_equal(found, wanted)
        assert torch.equal(logits(found), logits(wanted))
    newest = newest_checkpoint(tmp_path / "saved")
    assert newest is not None
    alone = joined([trainee("adamw", checkpoint=newest[0]).tensors()])
    assert_equal(alone, wanted)
    assert torch.equal(logits(alone), logits(wanted))
