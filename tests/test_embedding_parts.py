"""Embeddings in parts: the same files whoever makes them, kept when they are whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dist_dml import embedding_parts
from dist_dml.config import Config
from dist_dml.config_loading import resolve
from dist_dml.data.index import Index
from dist_dml.data.index_command import build_index
from dist_dml.data.shards import write_shard
from dist_dml.embedding_parts import claim_folder, embed_parts
from dist_dml.errors import RunError, UsageError
from dist_dml.parallel.world import Ranks, World
from dist_dml.retrieval.embedding_files import read_embeddings
from dist_dml.retrieval.embedding_manifest import EmbeddingJob, read_manifest
from dist_dml.split_embedding import embed_pixels, embed_split

ALONE = World(Ranks(), torch.device("cpu"), None, None)
CONFIG: Config = resolve(
    None,
    [
        "data.image={size: 4, channels: 1, resize: 0, mean: [0.5], std: [0.25]}",
        "data.loader_processes=0",
        "evaluation.batch_size=3",
    ],
).config
DAMAGED = 5


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """13 training images, the sixth of which has been overwritten, and 4 test images."""
    folder = tmp_path_factory.mktemp("noise")
    draw = np.random.default_rng(0)
    for split, count in (("train", 13), ("test", 4)):
        rows = []
        for i in range(count):
            png = cv2.imencode(".png", draw.integers(0, 256, (4, 4), np.uint8))[1].tobytes()
            rows.append({"__key__": f"{split}{i}", "png": png, "cls": b"ab"[i % 2 : i % 2 + 1]})
        write_shard(folder / f"{split}-000000.tar", rows)
    found = build_index(folder)
    sample = int(found.select("train")[DAMAGED])
    tar = found.shard_path(int(found.shard[sample]))
    content = bytearray(tar.read_bytes())
    start = int(found.offset[sample])
    content[start : start + 8] = b"no image"
    tar.write_bytes(content)
    return build_index(folder)


def job_of(index: Index, **changes: object) -> EmbeddingJob:
    fields = {
        "run": "pixels",
        "checkpoint": "none",
        "checkpoint_step": 0,
        "checkpoint_digest": "0" * 64,
        "config_digest": "1" * 64,
        "data": "noise",
        "splits": ["train", "test"],
        "fingerprint": index.fingerprint,
        "num_samples": 17,
        "dtype": "float32",
        "embedding_dim": 16,
        "part_rows": 4,
    }
    return EmbeddingJob.model_validate(fields | changes)


def embedded(index: Index, folder: Path, job: EmbeddingJob | None = None) -> Path:
    job = job or job_of(index)
    ids = np.concatenate([index.select(split) for split in job.splits])
    with claim_folder(folder, job, ALONE):
        embed_parts(embed_pixels, index, ids, job, folder, CONFIG, ALONE)
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted([*folder.glob("*.parquet"), *folder.glob("*.json")])
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_parts_hold_what_an_evaluation_embeds_and_what_the_index_knows(
    index: Index, tmp_path: Path
) -> None:
    found = read_embeddings(embedded(index, tmp_path / "out"))
    for split, rows in (("train", slice(0, 12)), ("test", slice(12, 16))):
        expected = embed_split(embed_pixels, index, split, CONFIG, ALONE)
        assert (found.embeddings.vectors[rows] == expected.vectors).all()
        assert (found.embeddings.ids[rows] == expected.ids).all()
        labels = [found.label_values[label] for label in found.embeddings.labels[rows]]
        assert labels == expected.labels.tolist()
    ids = found.embeddings.ids.tolist()
    assert found.metadata["key"] == [index.key(i) for i in ids]
    assert found.metadata["split"] == ["train"] * 12 + ["test"] * 4
    names = [index.class_names[i] for i in index.class_id[found.embeddings.ids]]
    assert found.metadata["class_name"] == names
    assert found.metadata["image_bytes"] == index.size[found.embeddings.ids].tolist()
    assert found.metadata["shard"][-1] == "test-000000.tar"
    assert found.metadata["extension"] == ["png"] * 16
    assert found.facts["fingerprint"] == index.fingerprint
    assert found.facts["splits"] == "train, test"


def test_a_damaged_image_is_left_out_and_counted(index: Index, tmp_path: Path) -> None:
    folder = embedded(index, tmp_path / "out")
    manifest = read_manifest(folder)
    assert manifest is not None
    assert [(part.rows, part.left_out) for part in manifest.parts] == [
        (4, 0),
        (3, 1),
        (4, 0),
        (4, 0),
        (1, 0),
    ]
    assert (manifest.rows, manifest.left_out) == (16, 1)
    for part in manifest.parts:
        content = (folder / part.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (part.bytes, part.sha256)
    damaged = int(index.select("train")[DAMAGED])
    assert damaged not in read_embeddings(folder).embeddings.ids


def test_where_no_image_can_be_read_nothing_is_finished(index: Index, tmp_path: Path) -> None:
    job = job_of(index, splits=["train"], num_samples=1)
    only = index.select("train")[DAMAGED : DAMAGED + 1]
    with (
        claim_folder(tmp_path / "out", job, ALONE),
        pytest.raises(RunError, match="none of the 1 images can be read"),
    ):
        embed_parts(embed_pixels, index, only, job, tmp_path / "out", CONFIG, ALONE)
    with pytest.raises(UsageError, match="is unfinished"):
        read_embeddings(tmp_path / "out")


def test_finished_parts_are_kept_and_damaged_or_missing_ones_made_anew(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = embedded(index, tmp_path / "out")
    whole = digests(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    content = bytearray((folder / "part-000001.parquet").read_bytes())
    content[len(content) // 3] ^= 1
    (folder / "part-000001.parquet").write_bytes(content)
    (folder / "part-000002.parquet").unlink()
    shutil.copy(folder / "part-000000.parquet", folder / "part-000003.parquet")
    (folder / "part-000004.parquet.99.tmp").write_bytes(b"of a process that was killed")
    (folder / "embeddings.json").unlink()
    capsys.readouterr()
    embedded(index, folder)
    told = capsys.readouterr().err
    assert "note: part-000001.parquet is made anew" in told
    assert "note: part-000003.parquet is made anew: it is of another job" in told
    assert "2 of 5 parts are there" in told
    assert digests(folder) == whole
    kept = [folder / f"part-00000{k}.parquet" for k in (0, 4)]
    assert [path.stat().st_mtime_ns for path in kept] == [times[path] for path in kept]
    assert not list(folder.glob("*.tmp"))


def test_a_finished_folder_stays_as_it_is(index: Index, tmp_path: Path) -> None:
    folder = embedded(index, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    embedded(index, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_a_folder_of_another_job_or_of_other_things_is_refused(
    index: Index, tmp_path: Path
) -> None:
    folder = embedded(index, tmp_path / "out")
    with pytest.raises(UsageError, match=r"another job \(checkpoint_step: 0 -> 7; dtype: float32"):
        embedded(index, folder, job_of(index, checkpoint_step=7, dtype="float16"))
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds other files \('cat.jpg'\)"):
        embedded(index, other)
    assert os.listdir(other) == ["cat.jpg"]
    with pytest.raises(UsageError, match="is a file"):
        embedded(index, other / "cat.jpg")


def test_two_at_once_do_not_write_one_folder(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_parts, "_LOCK_SECONDS", 0.2)
    job = job_of(index)
    with (
        claim_folder(tmp_path / "out", job, ALONE),
        pytest.raises(UsageError, match="being written by another"),
        claim_folder(tmp_path / "out", job, ALONE),
    ):
        pass


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    full = usage._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UsageError, match="GiB are free; free the disk"):
        embedded(index, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_folder_that_is_not_whole_is_not_read(index: Index, tmp_path: Path) -> None:
    folder = embedded(index, tmp_path / "out")
    (folder / "part-000002.parquet").rename(folder / "elsewhere")
    with pytest.raises(UsageError, match=r"part-000002.parquet is missing, and embeddings.json"):
        read_embeddings(folder)
    (folder / "elsewhere").rename(folder / "part-000002.parquet")
    assert len(read_embeddings(folder)) == 16
    manifest = json.loads((folder / "embeddings.json").read_text())
    manifest["parts"][0]["name"] = "../other.parquet"
    (folder / "embeddings.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"embeddings.json is damaged: .*parts.0.name"):
        read_embeddings(folder)


def test_float16_rounds_and_changes_nothing_else(index: Index, tmp_path: Path) -> None:
    plain = read_embeddings(embedded(index, tmp_path / "plain"))
    half = read_embeddings(embedded(index, tmp_path / "half", job_of(index, dtype="float16")))
    assert (half.embeddings.vectors == plain.embeddings.vectors.astype(np.float16)).all()
    assert half.metadata == plain.metadata


@pytest.mark.slow
def test_loader_processes_change_nothing(index: Index, tmp_path: Path) -> None:
    job = job_of(index)
    with_processes = CONFIG.model_copy(
        update={"data": CONFIG.data.model_copy(update={"loader_processes": 1})}
    )
    ids = np.concatenate([index.select(split) for split in job.splits])
    with claim_folder(tmp_path / "two", job, ALONE):
        embed_parts(embed_pixels, index, ids, job, tmp_path / "two", with_processes, ALONE)
    assert digests(tmp_path / "two") == digests(embedded(index, tmp_path / "plain"))


def test_embeddings_that_are_not_finite_end_it(index: Index, tmp_path: Path) -> None:
    job = job_of(index)
    ids = np.concatenate([index.select(split) for split in job.splits])
    with (
        claim_folder(tmp_path / "out", job, ALONE),
        pytest.raises(RunError, match="embeddings are not finite"),
    ):
        embed_parts(
            lambda images: embed_pixels(images) * torch.inf,
            *(index, ids, job, tmp_path / "out", CONFIG, replace(ALONE)),
        )
