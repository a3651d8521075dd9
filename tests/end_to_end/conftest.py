"""A small packed data set, a launcher of runs on it, and data that are divided by class."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from run_fixtures import data, launcher

from dist_dml.data.index_command import build_index
from dist_dml.data.shards import write_shard

__all__ = ["data", "divided_data", "launcher"]


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
