"""Collectives: each the exact adjoint of its forward, in worker order, for uneven rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.parallel.collectives import (
    PendingGather,
    PendingReduction,
    barrier,
    gather_equal,
    gather_objects,
    gather_uneven,
    merge_over_workers,
    scale_gradient,
)

D = 5
# Rows of each of three workers: equal, uneven, some without any row.
COUNTS = [(3, 3, 3), (4, 1, 2), (2, 0, 5), (0, 0, 1)]


def whole(counts: tuple[int, ...], seed: int = 0) -> Tensor:
    """The rows of all workers (R, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(counts), D, generator=generator, dtype=torch.float64)


def own(rows: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
    start = sum(counts[:rank])
    return rows[start : start + counts[rank]]


def collect(rank: int, num_workers: int, group: ProcessGroup) -> list[dict[str, Any]]:
    results = []
    for counts in COUNTS:
        rows = own(whole(counts), counts, rank)
        travelling = PendingGather(rows, counts, group)
        # Every worker computes another function of the gathered rows: its own cotangent.
        cotangent = whole(counts, seed=1 + rank)
        reduction = PendingReduction(cotangent, counts, group)
        labels = own(torch.arange(sum(counts)) * 2**40, counts, rank)
        # A transposed view: rows that are not contiguous in memory.
        wide = own(whole(counts).T.contiguous().T, counts, rank)
        results.append(
            {
                "gathered": travelling.wait(),
                "gradient": reduction.wait(),
                "labels": gather_uneven(labels, counts, group),
                "not contiguous": gather_uneven(wide, counts, group),
            }
        )
    extra = {
        "equal": gather_equal(torch.tensor([[rank, 10 * rank]]), group),
        "scalar": gather_equal(torch.tensor(float(rank)), group),
        "objects": gather_objects({"rank": rank, "rows": [rank] * rank}, group),
    }
    barrier(group)
    return [*results, extra]


def test_collectives_of_three_workers_equal_their_dense_twins(tmp_path: Path) -> None:
    results = run_workers(collect, 3, tmp_path)
    for case, counts in enumerate(COUNTS):
        rows = whole(counts)
        cotangents = [whole(counts, seed=1 + rank) for rank in range(3)]
        inner_forward, inner_backward = 0.0, 0.0
        for rank, worker in enumerate(results):
            got = worker[case]
            assert torch.equal(got["gathered"], rows)
            assert torch.equal(got["not contiguous"], rows)
            assert torch.equal(got["labels"], torch.arange(sum(counts)) * 2**40)
            total = own(torch.stack(cotangents).sum(0), counts, rank)
            torch.testing.assert_close(got["gradient"], total, rtol=1e-14, atol=1e-14)
            inner_forward += (got["gathered"] * cotangents[rank]).sum().item()
            inner_backward += (own(rows, counts, rank) * got["gradient"]).sum().item()
        # The definition of an adjoint: <A x, y> = <x, A^T y>, summed over the workers.
        assert abs(inner_forward - inner_backward) < 1e-12 * max(1.0, abs(inner_forward))
    for worker in results:
        assert worker[-1]["equal"].tolist() == [[[0, 0]], [[1, 10]], [[2, 20]]]
        assert worker[-1]["scalar"].tolist() == [0.0, 1.0, 2.0]
        assert [entry["rank"] for entry in worker[-1]["objects"]] == [0, 1, 2]
        assert [entry["rows"] for entry in worker[-1]["objects"]] == [[], [1], [2, 2]]


def merged(rank: int, num_workers: int, group: ProcessGroup) -> list[Tensor]:
    """By a rule that is not an all-reduce's: the order of the workers matters."""

    def rule(parts: Tensor) -> Tensor:
        assert parts.shape[0] == num_workers
        places = torch.arange(1, num_workers + 1, dtype=parts.dtype)
        return torch.stack((parts[:, 0].amax(0), (parts[:, 1] * places[:, None]).sum(0)))

    numbers = [torch.arange(2.0 * rows).view(2, rows) + 100 * rank for rows in (1, 3, 7, 12)]
    return [merge_over_workers(each.double(), rule, group) for each in numbers]


@pytest.mark.parametrize("num_workers", [2, 3, 4])
def test_numbers_of_rows_are_merged_in_worker_order(num_workers: int, tmp_path: Path) -> None:
    for results in run_workers(merged, num_workers, tmp_path):
        for got, rows in zip(results, (1, 3, 7, 12), strict=True):
            first, second = torch.arange(2.0 * rows).view(2, rows).double()
            weights = num_workers * (num_workers + 1) / 2
            ranks = sum(100 * rank * (rank + 1) for rank in range(num_workers))
            assert torch.equal(got[0], first + 100 * (num_workers - 1))
            assert torch.equal(got[1], second * weights + ranks)


def test_one_process_needs_no_group() -> None:
    rows = torch.randn(4, D)
    assert gather_uneven(rows, (4,), None) is rows
    assert torch.equal(gather_equal(rows, None), rows[None])
    assert merge_over_workers(rows, lambda parts: parts.sum(0), None) is rows
    assert gather_objects("x", None) == ["x"]
    barrier(None)


def test_scale_gradient_changes_the_gradient_and_nothing_else() -> None:
    values = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    scaled = scale_gradient(values, 4)
    assert torch.equal(scaled, values)
    (scaled * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [4.0, 40.0, 400.0]
    assert scale_gradient(values, 1) is values
