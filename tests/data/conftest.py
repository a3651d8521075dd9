"""A small synthetic data set and a maker of tars."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny_images import SHARD_SIZES, samples_of

from dist_dml.data.index import Index
from dist_dml.data.index_command import build_index
from dist_dml.data.shards import write_shard


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
