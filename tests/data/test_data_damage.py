"""Damaged images are replaced by others of their class, counted, listed, and too many refused."""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_images import image_of, png

from dist_dml.data.damage import Damage
from dist_dml.data.index import Index, load_index
from dist_dml.data.index_command import build_index
from dist_dml.data.loader import evaluation_batches, training_batches
from dist_dml.data.plan import Plan
from dist_dml.data.reader import open_reader, read_image
from dist_dml.data.shards import write_shard
from dist_dml.data_config import DataConfig, ImageConfig, StorageConfig
from dist_dml.errors import RunError

SIZE = 20
IMAGE = ImageConfig(size=SIZE, resize=0)
IGNORED = -7


def settings(processes: int = 0, **keys) -> DataConfig:
    return DataConfig(
        batch_size=8,
        loader_processes=processes,
        image=IMAGE,
        storage=StorageConfig(retries=1, retry_seconds=0.01),
        **keys,
    )


def damaged_copy(shard_folder: Path, folder: Path, numbers: list[int], what: bytes) -> Index:
    """A data set of whose training images those with the given numbers begin with `what`."""
    copy = load_index(shutil.copytree(shard_folder, folder))
    for number in numbers:
        sample = int(copy.select("train")[number])
        tar = copy.shard_path(int(copy.shard[sample]))
        data = bytearray(tar.read_bytes())
        start = int(copy.offset[sample])
        data[start : start + len(what)] = what
        tar.write_bytes(data)
    return build_index(folder)


@pytest.fixture
def broken(tmp_path: Path, shard_folder: Path, index: Index) -> Index:
    """Two of 31 training images are no images."""
    return damaged_copy(shard_folder, tmp_path / "copy", [3, 20], b"no image")


def run(index: Index, config: DataConfig, rank: int = 0, num_workers: int = 1, stop: int = 8):
    plan = Plan(index.select("train"), 8, seed=3)
    damage = Damage(index, plan.sample_ids, config, 11, IGNORED)
    batches = list(training_batches(index, plan, config, 11, rank, num_workers, 0, stop, damage))
    return batches, damage


def test_a_damaged_image_is_replaced_by_another_of_its_class(broken: Index) -> None:
    bad = set(broken.select("train")[[3, 20]].tolist())
    plan = Plan(broken.select("train"), 8, seed=3)
    batches, damage = run(broken, settings())
    reader, replaced = open_reader(broken, 3), 0
    for batch in batches:
        planned = plan.global_batch(batch.step)
        assert np.array_equal(batch.labels, broken.class_id[planned])
        assert bool(batch.readable.all())
        for row, sample in enumerate(batch.sample_ids.tolist()):
            assert sample not in bad
            assert broken.class_id[sample] == broken.class_id[planned[row]]
            replaced += sample != planned[row]
            stored = read_image(broken, reader, sample)
            assert (batch.images[row].float().mean() - stored.mean()).abs() < 10
    assert replaced == 4  # Two images, two epochs.
    assert damage.counts == {"not_an_image": 4}
    assert set(damage.entries) == bad
    assert damage.num_images == 62


@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_what_replaces_an_image_does_not_depend_on_the_layout(
    broken: Index, num_workers: int
) -> None:
    whole, _ = run(broken, settings())
    parts = [run(broken, settings(), rank, num_workers)[0] for rank in range(num_workers)]
    for one, *pieces in zip(whole, *parts, strict=True):
        for name in ("images", "labels", "sample_ids", "mirrored"):
            joined = torch.cat([getattr(piece, name) for piece in pieces])
            assert torch.equal(joined, getattr(one, name))


@pytest.mark.slow
def test_what_replaces_an_image_does_not_depend_on_loader_processes(broken: Index) -> None:
    for one, other in zip(run(broken, settings(2))[0], run(broken, settings())[0], strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.sample_ids, other.sample_ids)


def test_a_class_without_a_readable_image_is_left_out_of_the_loss(
    tmp_path: Path, shard_folder: Path, index: Index
) -> None:
    train = index.select("train")
    lost = np.flatnonzero(index.class_id[train] == 2).tolist()
    broken = damaged_copy(shard_folder, tmp_path / "copy", lost, b"no image")
    batches, damage = run(broken, settings(max_bad_share=1), stop=4)
    rows = torch.cat([batch.labels for batch in batches])
    images = torch.cat([batch.images for batch in batches])
    assert int((rows == IGNORED).sum()) == len(lost) == damage.counts["no_replacement"]
    assert not images[rows == IGNORED].any()
    assert not (rows == 2).any()
    # Each was met in its own place, and as a replacement that failed.
    assert damage.counts["not_an_image"] == len(lost) ** 2


def test_strict_stops_at_the_first_damaged_image(broken: Index) -> None:
    with pytest.raises(RunError, match=r"shard train-.*: key .* it is not a JPEG") as caught:
        run(broken, settings(strict=True))
    assert "\n" not in str(caught.value)


def test_too_large_a_share_of_damaged_images_stops_the_run(broken: Index) -> None:
    with pytest.raises(RunError, match=r"images are damaged.*data\.max_bad_share=0\.01") as caught:
        run(broken, settings(), stop=200)
    assert "dist-dml verify" in str(caught.value)
    assert run(broken, settings(max_bad_share=0.1), stop=200)[1].num_images > 1000


def test_damaged_images_in_a_row_stop_the_run(
    tmp_path: Path, shard_folder: Path, index: Index
) -> None:
    broken = damaged_copy(shard_folder, tmp_path / "copy", list(range(31)), b"no image")
    with pytest.raises(RunError, match=r"^12 images in a row are damaged.*max_bad_in_a_row=12"):
        run(broken, settings(max_bad_in_a_row=12))


def test_texts_bombs_and_torn_images_are_counted_by_kind(tmp_path: Path) -> None:
    """All of them were indexed as they are: what they are shows when they are decoded."""
    whole = png(image_of(0))
    bomb = bytearray(whole)
    bomb[16:24] = struct.pack(">II", 10_000, 10_000)  # 100 megapixels, says its header.
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    bad = {"jpg": b"a text that calls itself a picture", "png": bytes(bomb)}
    samples = [{"__key__": f"{n:03d}", "png": png(image_of(n)), "cls": b"0"} for n in range(13)]
    samples += [
        {"__key__": "text", "jpg": bad["jpg"], "cls": b"0"},
        {"__key__": "bomb", "png": bad["png"], "cls": b"0"},
        {"__key__": "torn", "png": whole[: len(whole) // 2], "cls": b"0"},
    ]
    write_shard(tmp_path / "train-000000.tar", samples)
    broken = build_index(tmp_path)
    batches, damage = run(broken, settings(max_bad_share=1), stop=2)
    kinds = {entry.key: entry.kind for entry in damage.entries.values()}
    assert kinds == {"text": "not_an_image", "bomb": "too_large", "torn": "undecodable"}
    # In their own places, and where one stood in for another.
    assert all(damage.counts[kind] >= 1 for kind in kinds.values())
    assert all(bool(batch.images.any(3).any(2).any(1).all()) for batch in batches)


def test_kinds_are_told_apart(tmp_path: Path, shard_folder: Path, index: Index) -> None:
    broken = damaged_copy(shard_folder, tmp_path / "copy", [5], b"no image")
    sample = int(broken.select("train")[9])
    tar = broken.shard_path(int(broken.shard[sample]))
    data = bytearray(tar.read_bytes())
    data[int(broken.offset[sample]) + 40] ^= 255  # After the index was made.
    times = tar.stat()
    tar.write_bytes(data)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    _, damage = run(broken, settings(max_bad_share=1), stop=4)
    assert damage.counts == {"not_an_image": 1, "checksum": 1}
    kinds = {entry.kind for entry in damage.entries.values()}
    assert kinds == {"not_an_image", "checksum"}


def test_an_evaluation_replaces_nothing(broken: Index) -> None:
    batches = list(evaluation_batches(broken, "train", settings(), 5, 0, 1))
    ids = torch.cat([batch.sample_ids for batch in batches])
    readable = torch.cat([batch.readable for batch in batches])
    assert np.array_equal(ids, broken.select("train"))
    assert np.flatnonzero(~readable.numpy()).tolist() == [3, 20]
    images = torch.cat([batch.images for batch in batches])
    assert not images[~readable].any()


def test_a_lost_shard_is_no_damaged_image(tmp_path: Path, shard_folder: Path, index: Index) -> None:
    copy = load_index(shutil.copytree(shard_folder, tmp_path / "copy"))
    copy.shard_path(int(copy.shard[copy.select("train")[0]])).unlink()
    with pytest.raises(RunError, match=r"train-000000\.tar.*(No such file|missing)") as caught:
        run(copy, settings())
    assert "\n" not in str(caught.value)
