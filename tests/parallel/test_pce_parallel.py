"""PCE over workers against one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.errors import UsageError
from dist_dml.losses.pairwise_cross_entropy import pairwise_cross_entropy
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.pce_parallel import class_parallel_pce

R, C, D, IGNORED, RIDGE = 16, 7, 5, -100, 0.3
ROW_COUNTS = {1: (16,), 2: (7, 9), 4: (5, 1, 0, 10)}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Rows, labels of which two are ignored, and the probabilities of some classifier."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(R, D, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, C, (R,), generator=draw)
    labels[[3, 11]] = IGNORED
    theta = torch.randn(C, D, generator=draw, dtype=torch.float64)
    return rows, labels, (rows @ theta.T).softmax(1)


def of_worker(rank: int, size: int, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Value and this worker's gradient."""
    rows, labels, probabilities = batch()
    counts = ROW_COUNTS[size]
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    partition = ClassPartition.of_worker(rank, size, C, group)
    leaf = rows[own].clone().requires_grad_()
    value = class_parallel_pce(
        leaf,
        labels[own],
        counts,
        probabilities[:, partition.start : partition.stop],
        partition,
        RIDGE,
        IGNORED,
    )
    (2 * value).backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def dense() -> tuple[Tensor, Tensor]:
    rows, labels, probabilities = batch()
    known = labels != IGNORED
    leaf = rows.clone().requires_grad_()
    value = pairwise_cross_entropy(leaf[known], labels[known], probabilities[known], RIDGE)
    (2 * value).backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def test_one_process_equals_the_dense_loss() -> None:
    value, gradient = of_worker(0, 1, None)
    wanted, expected = dense()
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_equal_one_process_with_the_whole_batch(num_workers: int, tmp_path: Path) -> None:
    found = run_workers(of_worker, num_workers, tmp_path)
    wanted, expected = dense()
    assert all(torch.equal(value, found[0][0]) for value, _ in found)
    torch.testing.assert_close(found[0][0], wanted, rtol=1e-12, atol=1e-12)
    whole = torch.cat([gradient for _, gradient in found]) / num_workers
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-12)


def test_a_ridge_that_is_not_above_0_is_refused() -> None:
    rows, labels, probabilities = batch()
    partition = ClassPartition(0, C, C)
    with pytest.raises(UsageError, match="lambda must be above 0"):
        class_parallel_pce(rows, labels, (R,), probabilities, partition, 0.0, IGNORED)
