"""A small packed data set, and a launcher of runs on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from launching import Launcher, training_processes

from dist_dml.data.index_command import build_index
from dist_dml.data.pack.folder import pack_folder
from dist_dml.data.shards import write_shard


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 classes of 14 noisy patterns, packed by `dist-dml pack folder`'s own function."""
    base = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for number in range(26):
        folder = base / "source" / f"class{number:02d}"
        folder.mkdir(parents=True)
        pattern = cv2.resize(draw.integers(0, 256, (4, 4), dtype=np.uint8), (20, 20))
        for sample in range(14):
            noisy = np.clip(pattern + draw.normal(0, 40, (20, 20)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(folder / f"{sample}.png"), noisy)
    pack_folder(base / "source", base / "packed", shard_samples=40, processes=1)
    return base / "packed"


@pytest.fixture
def launcher(data: Path, tmp_path: Path) -> Iterator[Launcher]:
    """A launcher whose runs lie in this test's own folder; nothing survives the test."""
    yield Launcher(data, tmp_path / "runs")
    for process in training_processes(tmp_path):
        process.kill()


@pytest.fixture(scope="session")
def divided_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 training and 6 test classes of 12 noisy patterns."""
    folder = tmp_path_factory.mktemp("divided")
    draw = np.random.default_rng(0)
    for split, classes in (("train", range(9)), ("test", range(9, 15))):
        rows = []
        for number in classes:
            pattern = cv2.resize(draw.integers(0, 256, (4, 4), dtype=np.uint8), (16, 16))
            for sample in range(12):
                noisy = np.clip(pattern + draw.normal(0, 70, (16, 16)), 0, 255).astype(np.uint8)
                png = cv2.imencode(".png", noisy)[1].tobytes()
                key = f"{number:02d}_{sample:02d}"
                rows.append({"__key__": key, "png": png, "cls": f"c{number:02d}".encode()})
        write_shard(folder / f"{split}-000000.tar", rows)
    build_index(folder)
    return folder
