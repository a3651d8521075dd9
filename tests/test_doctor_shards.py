"""What the doctor says of a data set: read by offset, decoded, damaged, absent, far away."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from shard_server import serving

from dist_dml.config_loading import resolve
from dist_dml.data.index_command import build_index, build_remote_index
from dist_dml.data.shards import write_shard
from dist_dml.doctor import shards
from dist_dml.doctor.findings import Check, Finding, Setting, run_check
from dist_dml.parallel.world import Ranks


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard with 40 images of 2 classes."""
    folder = tmp_path_factory.mktemp("packed")
    draw = np.random.default_rng(0)
    rows = []
    for number in range(40):
        image = draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        png = cv2.imencode(".png", image)[1].tobytes()
        rows.append({"__key__": f"{number:03d}", "png": png, "cls": str(number % 2).encode()})
    write_shard(folder / "train-000000.tar", rows)
    build_index(folder)
    return folder


def looked_at(folder: Path | str, *overrides: str) -> dict[str, Finding]:
    config = resolve(None, [f"data.path={folder}", *overrides]).config
    setting = Setting(config, Ranks(), {})
    found = run_check(Check("storage", "data", shards.shard_findings, 60), setting)
    return {finding.name: finding for finding in found}


def test_a_data_set_is_read_and_decoded(packed: Path) -> None:
    found = looked_at(packed)
    assert {finding.level for finding in found.values()} == {"ok"}
    assert set(found) == {"data", "reading", "decoding"}
    assert found["data"].values == {"images": 40, "shards": 1}
    for name in ("reading", "decoding"):
        assert found[name].values["images_per_second"] > 0


def test_a_damaged_image_is_named_with_the_command_that_leaves_it_out(
    packed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(packed, folder)
    tar = folder / "train-000000.tar"
    times = tar.stat()
    content = bytearray(tar.read_bytes())
    place = content.index(b"IDAT") + 20  # Of the first image.
    content[place] ^= 0xFF
    tar.write_bytes(bytes(content))
    # As bits that a disk has turned: the time of the file is what it was.
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = looked_at(folder)["damaged images"]
    assert found.level == "warning"
    assert found.measured.startswith("1 of 40, the first: train-000000.tar: key 000")
    assert f"dist-dml verify {folder}" in found.remedy


def test_a_data_set_that_cannot_be_opened_is_a_problem(packed: Path, tmp_path: Path) -> None:
    found = looked_at(tmp_path / "absent")["data"]
    assert found.level == "problem"
    assert "absent" in found.measured + found.remedy
    found = looked_at(packed, "data.split=tarin")["data"]
    assert found.level == "problem"
    assert "no samples of split 'tarin'" in found.measured
    assert looked_at("")["data"].level == "skipped"


def test_a_slow_decoder_is_told(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SLOW_IMAGES", 1e9)
    found = looked_at(packed)["decoding"]
    assert found.level == "warning"
    assert "pack the images at their training size" in found.remedy


def test_a_store_is_asked_for_a_few_images_and_not_for_whole_shards(
    packed: Path, tmp_path: Path
) -> None:
    with serving() as server:
        server.files["train-000000.tar"] = (packed / "train-000000.tar").read_bytes()
        folder = tmp_path / "far"
        cache = f"data.storage.cache={tmp_path / 'cache'}"
        build_remote_index(f"{server.url}/train-000000.tar", folder)
        server.requests.clear()
        found = looked_at(folder, cache)
        assert found["store"].level == "ok"
        assert "(8 asked)" in found["store"].measured
        assert len(server.requests) >= 8
        server.always["train-000000.tar"] = 403
        found = looked_at(folder, cache)
        assert found["store"].level == "problem"
        assert "403" in found["store"].measured
    assert not any((tmp_path / "cache").glob("**/*.tar"))
