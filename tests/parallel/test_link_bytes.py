"""What travels between workers in a step, counted at the process group: the least that is possible,
and on its way while something else is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worker_group import run_workers

from dist_dml.class_config import ClassesConfig
from dist_dml.config import OptimizerConfig
from dist_dml.loss_config import LossConfig
from dist_dml.losses.softmax import RowLoss
from dist_dml.parallel import class_kernels
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.cost import HeadShape, link_bytes

C, D, R = 400, 24, 36


class CountedBytes(TorchDispatchMode):
    """Bytes that this worker receives, by collective, read off what the process group is given."""

    def __init__(self, num_workers: int) -> None:
        super().__init__()
        self.num_workers = num_workers
        self.received: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            assert len(sizes) == 2, f"{name} is not one of the collectives of a step"
            # Gathering into the large one, or scattering the sum of it: all but the own part moves.
            moved = max(sizes) - min(sizes)
            if "alltoall" in name:
                moved = sizes[0] * (self.num_workers - 1) // self.num_workers
            self.received.setdefault(name, []).append(moved)
        return func(*args, **(kwargs or {}))


def counted_step(
    rank: int, num_workers: int, group: ProcessGroup | None, loss: LossConfig, backend: Any
) -> tuple[dict[str, list[int]], int]:
    partition = ClassPartition.of_worker(rank, num_workers, C, group)
    classifier = ClassParallelClassifier(
        D, partition, loss, OptimizerConfig(), 0, R, classes=ClassesConfig(backend=backend)
    )
    own = R // num_workers
    rows = torch.randn(own, D, requires_grad=True)
    labels = torch.randint(0, C, (own,))
    with CountedBytes(num_workers) as counter:
        output = classifier(rows, labels, (own,) * num_workers, R, factor=1.0)
        output.loss.backward()
    assert isinstance(classifier.objective.loss, RowLoss)
    row_numbers = classifier.objective.loss.row_numbers
    return counter.received, row_numbers


# Nine seconds each: all but two wait for `make test-slow`.
@pytest.mark.parametrize(
    ("backend", "loss", "numbers"),
    [
        ("torch", LossConfig(label_smoothing=0.1), 5),
        ("native", LossConfig(name="arcface"), 4),
        pytest.param("torch", LossConfig(), 3, marks=pytest.mark.slow),
        pytest.param("native", LossConfig(), 3, marks=pytest.mark.slow),
        pytest.param("native", LossConfig(label_smoothing=0.1), 5, marks=pytest.mark.slow),
        pytest.param("torch", LossConfig(name="arcface"), 4, marks=pytest.mark.slow),
        pytest.param("torch", LossConfig(name="cosface"), 4, marks=pytest.mark.slow),
        pytest.param("native", LossConfig(name="cosface"), 4, marks=pytest.mark.slow),
    ],
)
def test_a_step_receives_the_fewest_bytes(
    backend: Any, loss: LossConfig, numbers: int, tmp_path: Path
) -> None:
    """Rows and labels once, a few numbers a row, the sum of the rows' gradients once."""
    for num_workers in (2, 3):
        folder = tmp_path / str(num_workers)
        folder.mkdir()
        others = num_workers - 1
        own = R // num_workers
        for received, row_numbers in run_workers(counted_step, num_workers, folder, loss, backend):
            assert row_numbers == numbers
            rows, labels = others * own * D * 4, others * own * 8
            agreed = 2 * others * numbers * own * 4
            assert received["c10d::_reduce_scatter_base_"] == [rows]
            by_name = {name: sum(sizes) for name, sizes in received.items()}
            of_statistics = by_name.get("c10d::alltoall_base_", 0)
            assert of_statistics == (0 if num_workers == 2 else agreed // 2)
            total = sum(by_name.values())
            assert by_name["c10d::_allgather_base_"] == rows + labels + agreed - of_statistics
            assert total == 2 * rows + labels + agreed
            shape = HeadShape(C, D, R, num_workers, row_numbers=numbers)
            assert sum(link_bytes(shape)) == total


def gradient_is_sent_first(rank: int, num_workers: int, group: ProcessGroup | None) -> list[str]:
    """The order of a backward pass: the rows' gradient leaves before the weights are swept."""
    order: list[str] = []
    partition = ClassPartition.of_worker(rank, num_workers, C, group)
    classifier = ClassParallelClassifier(
        D, partition, LossConfig(), OptimizerConfig(), 0, R, classes=ClassesConfig(backend="native")
    )
    sweep = class_kernels._sweep

    def recorded(*args: Any) -> None:
        order.append("weights begin")
        sweep(*args)
        order.append("weights end")

    class Order(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "reduce_scatter" in func.name():
                order.append("sent")
            return func(*args, **(kwargs or {}))

    class_kernels._sweep = recorded  # type: ignore[assignment]
    rows = torch.randn(R // num_workers, D, requires_grad=True)
    output = classifier(rows, torch.arange(len(rows)), (len(rows),) * num_workers, R, factor=1.0)
    with Order():
        output.loss.backward()
    class_kernels._sweep = sweep
    assert rows.grad is not None
    return order


def test_the_rows_gradient_travels_while_the_weights_are_swept(tmp_path: Path) -> None:
    for order in run_workers(gradient_is_sent_first, 2, tmp_path):
        assert order == ["sent", "weights begin", "weights end"]
