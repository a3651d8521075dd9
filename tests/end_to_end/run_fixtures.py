"""A small packed data set and a launcher of runs on it, for the tests of runs and of faults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from launching import Launcher, training_processes

from dist_dml.data.pack.folder import pack_folder


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
