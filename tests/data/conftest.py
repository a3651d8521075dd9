"""Small synthetic data sets: every image is filled so that its pixels tell which sample it is."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from dist_dml.data.index import Index
from dist_dml.data.index_command import build_index
from dist_dml.data.shards import write_shard

NUM_CLASSES = 5
SHARD_SIZES = {"train-000000": 17, "train-000001": 14, "seen-000000": 6, "test-000000": 11}


def image_of(number: int) -> np.ndarray:
    """The 20 x 24 RGB image of sample `number`: noise that differs in every pixel."""
    return np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    """Encode RGB or grey."""
    colour = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", colour)[1].tobytes()


def samples_of(name: str, start: int) -> list[Mapping[str, str | bytes]]:
    """The samples of one shard; test classes are other ones than training classes."""
    label = "t" if name.startswith("test") else "c"
    return [
        {
            "__key__": f"{name}/{number:04d}",
            "png": png(image_of(number)),
            "cls": f"{label}{number % NUM_CLASSES}".encode(),
        }
        for number in range(start, start + SHARD_SIZES[name])
    ]


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tars without an index. Sample ids follow the sorted tar names: seen, test, train."""
    folder = tmp_path_factory.mktemp("shards")
    start = 0
    for name in sorted(SHARD_SIZES):
        write_shard(folder / f"{name}.tar", samples_of(name, start))
        start += SHARD_SIZES[name]
    return folder


@pytest.fixture(scope="session")
def index(shard_folder: Path) -> Index:
    """The index of `shard_folder`; sample id i has the pixels of `image_of(i)`."""
    return build_index(shard_folder)


@pytest.fixture
def make_tar() -> Callable[[Path, Sequence[tuple[str, bytes]]], Path]:
    """Write a tar of any members with `tarfile`, as foreign tools do."""

    def make(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return make
