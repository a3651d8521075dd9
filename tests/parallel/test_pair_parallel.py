"""Losses of pairs, computed by all workers in blocks, against loops over the pairs in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import AnchorLoss, Comparison, PairLoss, Pairs
from dist_dml.parallel.pair_parallel import (
    NUMBERS_A_PAIR,
    PairMemory,
    anchors_of_block,
    pair_parallel_loss,
)

B, M, D, IGNORED = 14, 9, 5, -7
ROW_COUNTS = {1: [(14,)], 2: [(7, 7), (3, 11), (0, 14)], 4: [(5, 1, 0, 8)]}


@dataclass(frozen=True)
class LogSumExp:
    """1/2 + log(1 + sum of exp(4 s) over the others) - 3 * the sum of cosines with the same; a mean
    over anchors, in which an anchor without any pair has a value and a weight as well."""

    comparison: Comparison = "cosine"
    sizes: list[int] = field(default_factory=list, repr=False)

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        self.sizes.append(len(pairs.values))
        others = torch.where(pairs.other, 4 * pairs.values, -torch.inf)
        others = torch.cat((others, torch.zeros_like(others[:, :1])), 1).logsumexp(1)
        values = 0.5 + others - 3 * torch.where(pairs.same, pairs.values, 0).sum(1)
        return AnchorLoss(values, torch.ones_like(values))


@dataclass(frozen=True)
class Hinge:
    """Distances of the same above 0.4, of others below 1.2; a mean over the terms above zero."""

    comparison: Comparison = "l2"

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        terms = torch.where(pairs.same, pairs.values - 0.4, 0).clamp_min(0)
        terms = terms + torch.where(pairs.other, 1.2 - pairs.values, 0).clamp_min(0)
        return AnchorLoss(terms.sum(1), (terms > 0).sum(1).to(terms.dtype))


def of_pairs(
    rows: Tensor,
    labels: Tensor,
    memory: PairMemory | None,
    pick: Callable[[Tensor, list[Any]], Any],
) -> Tensor:
    """sum(values) / max(sum(weights), 1), pair by pair from the definition.

    Args:
        pick: value and weight of an anchor, from its list of (row, whether it is of the same).
    """
    every = rows if memory is None else torch.cat((rows, memory.rows))
    of_every = [*labels.tolist(), *([] if memory is None else memory.labels.tolist())]
    total, weight = torch.zeros((), dtype=rows.dtype), 0.0
    for i in range(len(rows)):
        if of_every[i] == IGNORED:
            continue
        partners = [
            (every[j], of_every[j] == of_every[i])
            for j in range(len(every))
            if j != i and of_every[j] != IGNORED
        ]
        value, own_weight = pick(rows[i], partners)
        total, weight = total + value, weight + own_weight
    return total / max(weight, 1.0)


def log_sum_exp(anchor: Any, partners: list[Any]) -> Any:
    others, same = torch.ones((), dtype=anchor.dtype), torch.zeros((), dtype=anchor.dtype)
    for row, alike in partners:
        if alike:
            same = same + anchor @ row
        else:
            others = others + torch.exp(4 * (anchor @ row))
    return 0.5 + others.log() - 3 * same, 1.0


def hinge(anchor: Any, partners: list[Any]) -> Any:
    terms = []
    for row, alike in partners:
        distance = (anchor - row).pow(2).sum().sqrt()
        terms.append(distance - 0.4 if alike else 1.2 - distance)
    above = [term for term in terms if term > 0]
    return sum(above, torch.zeros((), dtype=anchor.dtype)), float(len(above))


LOSSES: dict[str, tuple[PairLoss, Any]] = {
    "log-sum-exp": (LogSumExp(), log_sum_exp),
    "hinge": (Hinge(), hinge),
}


def batch(seed: int = 0) -> tuple[Tensor, Tensor, PairMemory]:
    """Unit rows and their labels, two of them ignored, and a memory with an ignored row."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(B + M, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (B + M,), generator=generator)
    labels[[1, 11, B + 2]] = IGNORED
    rows = F.normalize(rows, dim=1)
    return rows[:B], labels[:B], PairMemory(rows[B:], labels[B:])


def dense(name: str, with_memory: bool) -> tuple[Tensor, Tensor]:
    """The loss of the whole batch, and the gradient of all its rows."""
    rows, labels, memory = batch()
    leaf = rows.clone().requires_grad_()
    value = of_pairs(leaf, labels, memory if with_memory else None, LOSSES[name][1])
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def of_one_process(
    loss: PairLoss, rows: Tensor, labels: Tensor, memory: PairMemory | None, mebibytes: float = 1.0
) -> tuple[Tensor, Tensor]:
    leaf = rows.clone().requires_grad_()
    counts = (len(rows),)
    value = pair_parallel_loss(leaf, labels, counts, loss, None, memory, mebibytes, IGNORED)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def shared(rank: int, num_workers: int, group: ProcessGroup) -> dict[Any, tuple[Tensor, ...]]:
    """Value, gradient of the own rows and, through a layer before, the layer's gradient."""
    rows, labels, memory = batch()
    results = {}
    for counts in ROW_COUNTS[num_workers]:
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        for name in LOSSES:
            for with_memory in (False, True):
                leaf = rows[own].clone().requires_grad_()
                layer = torch.eye(D, dtype=rows.dtype, requires_grad=True)
                value = pair_parallel_loss(
                    leaf @ layer,
                    labels[own],
                    counts,
                    LOSSES[name][0],
                    group,
                    memory if with_memory else None,
                    NUMBERS_A_PAIR * (B + M) * 8 * 2 / 2**20,  # Blocks of two anchors.
                    IGNORED,
                )
                value.backward()
                assert leaf.grad is not None
                assert layer.grad is not None
                results[counts, name, with_memory] = (value.detach(), leaf.grad, layer.grad)
    return results


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_share_the_loss_of_one_process(num_workers: int, tmp_path: Path) -> None:
    found = run_workers(shared, num_workers, tmp_path)
    for case in found[0]:
        _, name, with_memory = case
        value, gradient = dense(name, with_memory)
        assert all(torch.equal(worker[case][0], found[0][case][0]) for worker in found)
        close(found[0][case][0], value)
        # What engines average over workers: the rows' gradient is times the number of workers.
        close(torch.cat([worker[case][1] for worker in found]), num_workers * gradient)
        averaged = torch.stack([worker[case][2] for worker in found]).mean(0)
        close(averaged, batch()[0].T @ gradient)


@pytest.mark.parametrize("with_memory", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_process_without_a_group_equals_the_loop_over_pairs(name: str, with_memory: bool) -> None:
    rows, labels, memory = batch()
    got = of_one_process(LOSSES[name][0], rows, labels, memory if with_memory else None)
    for each, expected in zip(got, dense(name, with_memory), strict=True):
        close(each, expected)


@pytest.mark.parametrize("anchors", [1, 3, 5, 14, 100])
def test_blocks_of_any_size_give_the_same(anchors: int) -> None:
    rows, labels, memory = batch()
    budget = NUMBERS_A_PAIR * (B + M) * 8 * (anchors + 0.5) / 2**20
    for name, (loss, _) in LOSSES.items():
        for each, expected in zip(
            of_one_process(loss, rows, labels, memory, budget), dense(name, True), strict=True
        ):
            close(each, expected)
    loss = LogSumExp()
    of_one_process(loss, rows, labels, memory, budget)
    full, rest = divmod(B, anchors)
    once = [anchors] * full + ([rest] if rest else [])
    assert loss.sizes == once + once  # Forward and backward, every anchor once in each.


def test_ignored_rows_are_as_if_they_were_not_there() -> None:
    rows, labels, memory = batch()
    counted, remembered = labels != IGNORED, memory.labels != IGNORED
    assert not counted.all()
    assert not remembered.all()
    fewer = PairMemory(memory.rows[remembered], memory.labels[remembered])
    for loss, _ in LOSSES.values():
        value, gradient = of_one_process(loss, rows, labels, memory)
        without = of_one_process(loss, rows[counted], labels[counted], fewer)
        close(value, without[0])
        close(gradient[counted], without[1])
        assert (gradient[~counted] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_memory_changes_the_loss_and_gets_no_gradient(name: str) -> None:
    rows, labels, memory = batch()
    loss = LOSSES[name][0]
    remembered = memory.rows.clone().requires_grad_()
    with_memory = of_one_process(loss, rows, labels, PairMemory(remembered, memory.labels))
    without = of_one_process(loss, rows, labels, None)
    assert abs(with_memory[0] - without[0]) > 1e-3
    assert (with_memory[1] - without[1]).abs().max() > 1e-3
    assert remembered.grad is None
    empty = of_one_process(loss, rows, labels, PairMemory(memory.rows[:0], memory.labels[:0]))
    assert torch.equal(empty[0], without[0])
    assert torch.equal(empty[1], without[1])


def test_a_memory_of_another_dtype_is_cast() -> None:
    rows, labels, memory = batch()
    narrow = memory.rows.float()
    got = of_one_process(Hinge(), rows, labels, PairMemory(narrow, memory.labels))
    wide = of_one_process(Hinge(), rows, labels, PairMemory(narrow.double(), memory.labels))
    assert got[1].dtype == torch.float64
    assert torch.equal(got[0], wide[0])
    assert torch.equal(got[1], wide[1])


def test_a_memory_that_changes_before_the_backward_is_noticed() -> None:
    rows, labels, memory = batch()
    leaf = rows.clone().requires_grad_()
    ring = memory.rows.clone()
    seen = PairMemory(ring[:4], memory.labels[:4])
    value = pair_parallel_loss(leaf, labels, (B,), Hinge(), None, seen, 1.0, IGNORED)
    ring.index_copy_(0, torch.tensor([0]), rows[:1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_factor_of_the_loss_is_one_of_the_gradient() -> None:
    rows, labels, memory = batch()
    leaf = rows.clone().requires_grad_()
    value = pair_parallel_loss(leaf, labels, (B,), Hinge(), None, memory, 1.0, IGNORED)
    (2.5 * value).backward()
    assert leaf.grad is not None
    close(leaf.grad, 2.5 * of_one_process(Hinge(), rows, labels, memory)[1])


def test_a_batch_of_ignored_rows_loses_nothing() -> None:
    rows, labels, memory = batch()
    for loss, _ in LOSSES.values():
        value, gradient = of_one_process(loss, rows, torch.full_like(labels, IGNORED), memory)
        assert value == 0
        assert (gradient == 0).all()


def test_a_budget_below_one_anchor_is_refused_with_one_that_suffices() -> None:
    with pytest.raises(UsageError, match=r"block_mebibytes=1 .* 400000 rows; set it to 24\.5 or"):
        anchors_of_block(400_000, 1.0, 4)
    assert anchors_of_block(400_000, 24.5, 4) == 1
    assert anchors_of_block(4096, 4, 4) == 2**22 // (NUMBERS_A_PAIR * 4096 * 4)


@pytest.mark.parametrize("loss", [LogSumExp(), Hinge()], ids=str)
def test_a_step_holds_its_blocks_and_no_matrix_of_all_pairs(loss: PairLoss) -> None:
    num_rows, width, mebibytes = 4096, 64, 4
    rows = F.normalize(torch.randn(num_rows, width), dim=1).requires_grad_()
    labels = torch.arange(num_rows) // 4
    with LiveBytes() as counter:
        value = pair_parallel_loss(rows, labels, (num_rows,), loss, None, None, mebibytes, IGNORED)
        value.backward()
    budget, of_rows = mebibytes * 2**20, num_rows * width * 4
    assert 0.3 * budget < counter.peak <= budget + 3 * of_rows + 64 * num_rows
    assert counter.peak < num_rows**2 // 2  # Not even a mask of all pairs would fit.
