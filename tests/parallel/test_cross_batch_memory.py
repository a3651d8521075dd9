"""Cross-batch memory: a ring, the same on every worker, that continues from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.distributed import ProcessGroup
from worker_group import run_workers

from dist_dml.errors import UsageError
from dist_dml.losses.pairs import AnchorLoss, Comparison, Pairs
from dist_dml.parallel.collectives import gather_uneven
from dist_dml.parallel.cross_batch_memory import CrossBatchMemory
from dist_dml.parallel.pair_parallel import pair_parallel_loss

D = 3
# Rows of each of two workers in each of four steps, for a memory of ten rows.
STEPS = [(4, 3), (1, 5), (6, 6), (2, 0)]


def memory_of(size: int, warmup_steps: int = 0) -> CrossBatchMemory:
    return CrossBatchMemory(size, D, torch.float64, "cpu", warmup_steps)


def numbered(first: int, last: int) -> tuple[Tensor, Tensor]:
    """Rows that hold their number, which is their label too."""
    labels = torch.arange(first, last)
    return labels[:, None].double().expand(-1, D).contiguous(), labels


def held(memory: CrossBatchMemory) -> list[int]:
    """Labels of the filled places in their order; the rows must go with them."""
    contents = memory.contents()
    if contents is None:
        return []
    assert torch.equal(contents.rows, contents.labels[:, None].double().expand(-1, D))
    return contents.labels.tolist()


def test_the_oldest_rows_leave_first() -> None:
    memory = memory_of(5)
    assert memory.contents() is None
    expected = [[0, 1], [0, 1, 2, 3], [5, 1, 2, 3, 4], [5, 6, 7, 3, 4], [5, 6, 7, 8, 9]]
    for step, places in enumerate(expected):
        memory.push(*numbered(*[(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)][step]))
        assert held(memory) == places
        assert memory.filled == len(places)


@pytest.mark.parametrize("first", [0, 3])
def test_of_a_batch_larger_than_the_memory_the_last_rows_stay(first: int) -> None:
    memory = memory_of(4)
    memory.push(*numbered(0, first))
    memory.push(*numbered(first, 13))
    assert sorted(held(memory)) == [9, 10, 11, 12]
    memory.push(*numbered(13, 14))
    assert sorted(held(memory)) == [10, 11, 12, 13]  # Of those the oldest left.


def test_nothing_is_stored_during_the_warm_up() -> None:
    memory = memory_of(5, warmup_steps=2)
    for step in range(2):
        memory.push(*numbered(step, step + 1))
        assert memory.contents() is None
    memory.push(*numbered(2, 4))
    assert held(memory) == [2, 3]


def test_stored_rows_are_copies_without_gradient() -> None:
    memory = memory_of(5)
    rows, labels = numbered(0, 3)
    memory.push(rows.requires_grad_(), labels)
    with torch.no_grad():
        rows += 1
    labels += 1
    assert held(memory) == [0, 1, 2]
    contents = memory.contents()
    assert contents is not None
    assert not contents.rows.requires_grad


@pytest.mark.parametrize("saved_after", [0, 1, 2, 4])
def test_a_memory_continues_after_a_checkpoint(saved_after: int) -> None:
    batches = [numbered(3 * step, 3 * step + 3) for step in range(8)]
    whole, before, after = (memory_of(7, warmup_steps=2) for _ in range(3))
    for step, part in enumerate(batches):
        whole.push(*part)
        (before if step < saved_after else after).push(*part)
        if step + 1 == saved_after:
            after.load(load(save(before.tensors())))
    assert held(after) == held(whole)
    for name, tensor in whole.tensors().items():
        assert torch.equal(after.tensors()[name], tensor)


def test_a_checkpoint_of_another_memory_is_refused() -> None:
    tensors = memory_of(7).tensors()
    with pytest.raises(UsageError, match=r"\(7, 3\), configured \(8, 3\)"):
        memory_of(8).load(tensors)
    with pytest.raises(UsageError, match=r"\(7, 3\), configured \(7, 4\)"):
        CrossBatchMemory(7, 4, torch.float64, "cpu").load(tensors)
    with pytest.raises(UsageError, match="lacks pushes, stored; resume"):
        memory_of(7).load({name: tensors[name] for name in ("rows", "labels")})
    for size, steps in ((0, 0), (1, -1)):
        with pytest.raises(UsageError, match=f"size={size} and warmup_steps={steps}"):
            memory_of(size, steps)


class Attraction:
    """Pulls the same together and pushes others apart, by cosines; a mean over pairs."""

    comparison: Comparison = "inner"

    def of_anchors(self, pairs: Pairs) -> AnchorLoss:
        values = (pairs.values**2 * pairs.other - pairs.values * pairs.same).sum(1)
        return AnchorLoss(values, (pairs.other | pairs.same).sum(1).double())


def train(rank: int, num_workers: int, group: ProcessGroup | None) -> dict[str, Any]:
    """Four steps of a linear embedder with a memory; resumed after the second on a fresh one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.eye(D, dtype=torch.float64)
    memory, losses = memory_of(10, warmup_steps=1), []
    for step, of_two in enumerate(STEPS):
        inputs = torch.randn(sum(of_two), D, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 3, (sum(of_two),), generator=generator)
        counts = of_two if num_workers == 2 else (sum(of_two),)
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        weight = weight.detach().requires_grad_()
        rows = inputs[own] @ weight
        loss = pair_parallel_loss(
            rows, labels[own], counts, Attraction(), group, memory.contents(), 1.0, -1
        )
        loss.backward()
        assert weight.grad is not None
        gradient = gather_uneven(weight.grad[None], (1,) * num_workers, group).mean(0)
        memory.push(
            gather_uneven(rows.detach(), counts, group), gather_uneven(labels[own], counts, group)
        )
        weight = weight.detach() - 0.1 * gradient
        losses.append(loss.detach())
        if step == 1:
            stored = save(memory.tensors())
            memory = memory_of(10, warmup_steps=1)
            memory.load(load(stored))
    return {"losses": torch.stack(losses), "weight": weight, **memory.tensors()}


def test_training_with_a_memory_is_that_of_one_process_on_two_workers(tmp_path: Path) -> None:
    first, second = run_workers(train, 2, tmp_path)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])  # The same bits: no worker has its own memory.
    for name, tensor in train(0, 1, None).items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-12, atol=1e-13)
    assert first["stored"] == sum(sum(counts) for counts in STEPS[1:])
