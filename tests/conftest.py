"""Before any test is collected, and data for several files of tests."""

from __future__ import annotations

import contextlib
import multiprocessing.forkserver
import os
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # torch reads it when it is imported. Two processes of two threads each on two cores spend half
    # of their time waiting for one another's threads. Tests of threads set their own number.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Ray's workers would yield to the other process's tests.
    os.environ.setdefault("RAY_worker_niceness", "0")

import torch

if TYPE_CHECKING:
    from dist_dml.data.index import Index

if not torch.cuda.is_available():
    # Without a GPU the kernels' tests run in Triton's interpreter. Triton asks the environment when
    # it is first imported, which timm or another library would do earlier than those tests.
    # Processes that tests start must not see the variable.
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
    del os.environ["TRITON_INTERPRET"]


# What workers and test modules import: a worker would take seconds for it, a fork of a server that
# has it takes none. The first to start a forkserver decides: the loader, with less, if not we here.
multiprocessing.forkserver.set_forkserver_preload(
    ["torch", "torch.distributed", "torch._dynamo", "pytest", "dist_dml.train"]
)
multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """4 classes in `train`, 2 others in `test`, and an image of a training class in `seen`."""
    import cv2
    import numpy as np

    from dist_dml.data.index_command import build_index
    from dist_dml.data.shards import write_shard

    folder = tmp_path_factory.mktemp("divisible")
    image = cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes()
    for split, labels in (("train", "aabbccdd"), ("test", "xxyy"), ("seen", "a")):
        rows = [
            {"__key__": f"{split}{i}", "png": image, "cls": label.encode()}
            for i, label in enumerate(labels)
        ]
        write_shard(folder / f"{split}-000000.tar", rows)
    return build_index(folder)
