"""Batches are the plan's, whoever decodes them, and a failure is one line and leaves nobody."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from dist_dml.data.augment import evaluation_transform, train_transform
from dist_dml.data.index import load_index
from dist_dml.data.index_command import build_index
from dist_dml.data.loader import evaluation_batches, training_batches
from dist_dml.data.plan import Plan
from dist_dml.data.reader import open_reader, read_image
from dist_dml.data_config import AugmentConfig, DataConfig, ImageConfig
from dist_dml.errors import RunError, UsageError
from dist_dml.keyed_random import key_of

IMAGE = ImageConfig(size=16, resize=20)
AUGMENT = AugmentConfig(crop_scale=(0.3, 1.0), horizontal_flip=0.5, rotation_degrees=15, noise=4)


def settings(processes=0, batch_size=8) -> DataConfig:
    return DataConfig(
        batch_size=batch_size, loader_processes=processes, prefetch=2, image=IMAGE, augment=AUGMENT
    )


def plan_of(index, batch_size=8, accumulate=1) -> Plan:
    return Plan(index.select("train"), batch_size, accumulate, seed=3)


def run(index, rank=0, num_workers=1, processes=0, accumulate=1, start=0, stop=9):
    plan = plan_of(index, accumulate=accumulate)
    config = settings(processes)
    return list(training_batches(index, plan, config, 11, rank, num_workers, start, stop))


def assert_same(batches, others):
    for a, b in zip(batches, others, strict=True):
        for name in ("images", "mirrored", "labels", "sample_ids", "positions"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert (a.step, a.micro, a.row_counts) == (b.step, b.micro, b.row_counts)


def test_batches_hold_the_planned_samples_with_their_labels_and_pixels(index):
    plan, reader = plan_of(index), open_reader(index, 3)
    batches = run(index)
    assert [batch.step for batch in batches] == list(range(9))  # 31 samples: epochs of 4 steps.
    for batch in batches:
        ids = plan.global_batch(batch.step)
        assert np.array_equal(batch.sample_ids, ids)
        assert np.array_equal(batch.labels, index.class_id[ids])
        assert batch.row_counts == (len(ids),)
        for row, sample in enumerate(ids):
            key = key_of(11, "augment", batch.step, row)
            view = train_transform(read_image(index, reader, int(sample)), IMAGE, AUGMENT, key)
            image = batch.images_on(torch.device("cpu"))[row]
            assert np.array_equal(image.numpy().transpose(1, 2, 0), view)


@pytest.mark.parametrize("num_workers", [2, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_workers_together_get_the_rows_of_one(index, num_workers, accumulate):
    whole = run(index, accumulate=accumulate)
    parts = [run(index, rank, num_workers, accumulate=accumulate) for rank in range(num_workers)]
    for one, *pieces in zip(whole, *parts, strict=True):
        for name in ("images", "mirrored", "labels", "sample_ids", "positions"):
            joined = torch.cat([getattr(piece, name) for piece in pieces])
            assert torch.equal(joined, getattr(one, name))
        counts = tuple(len(piece.labels) for piece in pieces)
        assert all(piece.row_counts == counts for piece in pieces)


def test_accumulation_changes_neither_samples_nor_pixels(index):
    whole, halves = run(index), run(index, accumulate=2)
    for one, first, second in zip(whole, halves[::2], halves[1::2], strict=True):
        assert torch.equal(torch.cat([first.images, second.images]), one.images)
        assert torch.equal(torch.cat([first.positions, second.positions]), one.positions)
        assert (first.micro, second.micro) == (0, 1)


def test_a_run_can_start_at_any_step(index):
    assert_same(run(index, start=5), run(index)[5:])


def test_too_few_rows_are_refused_before_the_first_batch(index):
    with pytest.raises(UsageError, match=r"last batch of an epoch has 7 rows"):
        training_batches(index, plan_of(index), settings(), 0, 0, 8, 0, 1)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 13])
def test_evaluation_reads_every_sample_of_the_split_once(index, num_workers):
    reader, ids = open_reader(index, 3), index.select("test")
    batches = [
        list(evaluation_batches(index, "test", settings(), 4, rank, num_workers))
        for rank in range(num_workers)
    ]
    flat = [batch for mine in batches for batch in mine]
    assert np.array_equal(torch.cat([batch.sample_ids for batch in flat]), ids)
    assert np.array_equal(torch.cat([batch.positions for batch in flat]), np.arange(len(ids)))
    assert np.array_equal(torch.cat([batch.labels for batch in flat]), index.class_id[ids])
    for rank, mine in enumerate(batches):
        for number, batch in enumerate(mine):
            assert (batch.step, batch.row_counts[rank]) == (number, len(batch.labels))
            wanted = evaluation_transform(
                read_image(index, reader, int(batch.sample_ids[0])), IMAGE
            )
            assert np.array_equal(batch.images[0].numpy().transpose(1, 2, 0), wanted)


def test_an_empty_split_is_refused_before_the_first_batch(index):
    with pytest.raises(UsageError, match="no samples of split 'val'"):
        evaluation_batches(index, "val", settings(), 4, 0, 1)


def broken_copy(shard_folder, folder):
    """A data set whose fourth training image is not an image."""
    copy = load_index(shutil.copytree(shard_folder, folder))
    sample = int(copy.select("train")[3])
    tar = copy.shard_path(int(copy.shard[sample]))
    data = bytearray(tar.read_bytes())
    data[copy.offset[sample] : copy.offset[sample] + 8] = b"no image"
    tar.write_bytes(data)
    return build_index(folder)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_nothing_depends_on_the_number_of_loader_processes(index, processes):
    state = torch.get_rng_state()
    there = run(index, processes=processes, accumulate=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(there, run(index, accumulate=2))
    config = settings(processes)
    there = list(evaluation_batches(index, "test", config, 4, 0, 1))
    assert_same(there, list(evaluation_batches(index, "test", settings(), 4, 0, 1)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_any_layout_with_real_processes_gives_the_same_batches_and_goes_on_from_another(
    index, num_workers
):
    """0 to 3 loader processes; the run stops at step 5 and goes on with one process more."""
    whole = run(index)
    for processes in range(4):
        parts = []
        for rank in range(num_workers):
            first = run(index, rank, num_workers, processes, stop=5)
            parts.append(first + run(index, rank, num_workers, (processes + 1) % 4, start=5))
        for one, *pieces in zip(whole, *parts, strict=True):
            for name in ("images", "mirrored", "labels", "sample_ids", "positions"):
                joined = torch.cat([getattr(piece, name) for piece in pieces])
                assert torch.equal(joined, getattr(one, name)), (processes, name)
    seen = torch.cat([batch.sample_ids for batch in whole[:4]])
    assert torch.equal(seen.sort().values, torch.from_numpy(index.select("train")))


@pytest.mark.slow
def test_a_failure_in_a_loader_process_is_one_line_in_its_turn(tmp_path, shard_folder, index):
    broken = broken_copy(shard_folder, tmp_path / "copy")
    bad = int(broken.select("train")[3])
    before = next(i for i in range(4) if bad in plan_of(broken).global_batch(i))
    strict = settings(2).model_copy(update={"strict": True})
    batches = training_batches(broken, plan_of(broken), strict, 11, 0, 1, 0, 4)
    assert [next(batches).step for _ in range(before)] == list(range(before))
    with pytest.raises(RunError, match=r"shard train-.*: key .* cannot be read") as caught:
        next(batches)
    assert "\n" not in str(caught.value)


TRAINER = """
import sys, time
from dist_dml.data.index import load_index
from tests_settings import settings, plan_of
from dist_dml.data.loader import training_batches

if __name__ == "__main__":
    index = load_index(sys.argv[1])
    batches = training_batches(index, plan_of(index), settings(2), 0, 0, 1, 0, 10**6)
    next(batches)
    print("ready", flush=True)
    for batch in batches if sys.argv[2] == "busy" else ():
        pass
    time.sleep(60)
"""


def start_trainer(tmp_path, shard_folder, kind):
    shutil.copy(__file__, tmp_path / "tests_settings.py")
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", os.getcwd(), *sys.path])}
    trainer = subprocess.Popen(
        [sys.executable, str(script), str(shard_folder), kind],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    return trainer, psutil.Process(trainer.pid).children(recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["idle", "busy"])
def test_loader_processes_do_not_survive_a_killed_trainer(tmp_path, shard_folder, index, kind):
    trainer, children = start_trainer(tmp_path, shard_folder, kind)
    with trainer:
        assert len(children) >= 3  # Two loader processes and the forkserver.
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive


@pytest.mark.slow
def test_a_killed_loader_process_stops_the_run_with_one_line(index):
    batches = training_batches(index, plan_of(index), settings(1), 0, 0, 1, 0, 10**6)
    next(batches)
    loaders = [
        child
        for child in psutil.Process().children(recursive=True)
        if any("forkserver" in part for part in child.cmdline()) and not child.children()
    ]
    for loader in loaders:
        loader.kill()
    started = time.monotonic()
    with pytest.raises(RunError, match=r"a loader process died.*data\.prefetch=2") as caught:
        for _ in batches:
            pass
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 15
