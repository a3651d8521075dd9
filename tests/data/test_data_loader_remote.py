"""Training batches from a web server on a bad day are those of the local tars, or a clear end."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_server import ShardServer, serving, within
from tiny_images import image_of, png

from dist_dml.data.index import Index
from dist_dml.data.index_command import build_index, build_remote_index
from dist_dml.data.loader import training_batches
from dist_dml.data.opening import open_plan
from dist_dml.data.shards import write_shard
from dist_dml.data_config import DataConfig, ImageConfig, StorageConfig
from dist_dml.errors import RunError

NUM_SHARDS = 8
SHARD_SAMPLES = 6


@pytest.fixture
def local(tmp_path: Path) -> Index:
    """Eight tars of six images."""
    folder = tmp_path / "local"
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        numbers = range(shard * SHARD_SAMPLES, (shard + 1) * SHARD_SAMPLES)
        samples = [
            {"__key__": f"{n:04d}", "png": png(image_of(n)), "cls": f"{n % 5}".encode()}
            for n in numbers
        ]
        write_shard(folder / f"train-{shard:06d}.tar", samples)
    return build_index(folder)


def settings(cache: Path, processes: int = 0, retries: int = 4) -> DataConfig:
    return DataConfig(
        batch_size=8,
        loader_processes=processes,
        locality="window",
        window_shards=2,
        image=ImageConfig(size=16, resize=0),
        storage=StorageConfig(
            cache=str(cache),
            cache_mebibytes=1,
            ahead_shards=2,
            retries=retries,
            retry_seconds=0.02,
        ),
    )


def remote_copy(server: ShardServer, local: Index, out: Path) -> Index:
    for name in local.shards:
        server.files[name] = (local.folder / name).read_bytes()
    return build_remote_index(f"{server.url}/*.tar", out, processes=1)


def batches(index: Index, config: DataConfig, stop: int = 12) -> list:
    plan = open_plan(index, config, 1, 3)
    return list(training_batches(index, plan, config, 11, 0, 1, 0, stop))


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_503_short_answers_and_lost_connections_change_nothing(
    tmp_path: Path, local: Index, processes: int
) -> None:
    with serving() as server:
        remote = remote_copy(server, local, tmp_path / "remote")
        assert remote.fingerprint == local.fingerprint
        for number, name in enumerate(local.shards):
            server.faults[name].extend([[503, 503], [("cut", 700)], ["drop", 429]][number % 3])
        config = settings(tmp_path / "cache", processes)
        found = within(60, lambda: batches(remote, config))
        asked = len(server.requests)
    wanted = batches(local, settings(tmp_path / "unused"))
    assert isinstance(found, list)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.sample_ids, other.sample_ids)
    ids = torch.cat([batch.sample_ids for batch in found[:6]])
    assert np.array_equal(ids.sort().values.numpy(), remote.select("train"))
    assert asked > NUM_SHARDS * 2  # The faults were really met.


def test_a_store_that_stays_away_ends_the_run_and_replaces_nothing(
    tmp_path: Path, local: Index
) -> None:
    with serving() as server:
        remote = remote_copy(server, local, tmp_path / "remote")
        for name in local.shards:
            server.always[name] = 503
        started = time.monotonic()
        with pytest.raises(RunError, match=r"train-.*\.tar: key .* cannot be had: .*503") as caught:
            within(60, lambda: batches(remote, settings(tmp_path / "cache", retries=2)))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 30


def test_a_changed_object_is_refused(tmp_path: Path, local: Index) -> None:
    with serving() as server:
        remote = remote_copy(server, local, tmp_path / "remote")
        for name in local.shards:
            changed = bytearray(server.files[name])
            changed[600] ^= 1
            server.files[name] = bytes(changed)
        with pytest.raises(RunError, match=r"changed|other") as caught:
            within(60, lambda: batches(remote, settings(tmp_path / "cache")))
    assert "index" in str(caught.value)
