"""The ledger: one number for the rows that were trained on, the same in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from worker_group import run_workers

from dist_dml.batch_ledger import BatchLedger, marks_of
from dist_dml.parallel.world import Ranks, World

ALONE = World(Ranks(), torch.device("cpu"), None, None)
STEPS, ROWS = 6, 11


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and samples of a step."""
    samples = torch.randperm(1000, generator=torch.Generator().manual_seed(step))[:ROWS]
    return torch.arange(ROWS), samples


def whole_ledger() -> int:
    ledger = BatchLedger()
    for step in range(STEPS):
        ledger.add(step, *batch(step))
    return ledger.total(ALONE)


def ledger_of_worker(rank: int, size: int, group: Any) -> list[int]:
    """Every worker adds its own rows, with totals taken in between, as checkpoints do."""
    world = World(Ranks(rank, size), torch.device("cpu"), group, None)
    ledger, totals = BatchLedger(), []
    for step in range(STEPS):
        positions, samples = batch(step)
        ledger.add(step, positions[rank::size], samples[rank::size])
        if step % 2:
            totals.append(ledger.total(world))
    return totals


def test_workers_and_restarts_do_not_change_it(tmp_path: Path) -> None:
    expected = whole_ledger()
    for size in (2, 3):
        found = run_workers(ledger_of_worker, size, tmp_path)
        assert all(totals[-1] == expected for totals in found)
    # Stopped after four steps and continued from what was stored.
    before = found[0][1]
    after = BatchLedger(before)
    for step in (4, 5):
        after.add(step, *batch(step))
    assert after.total(ALONE) == expected


def test_a_gap_a_repeat_an_exchange_or_another_order_changes_it() -> None:
    expected = whole_ledger()
    variants = {
        "gap": [0, 1, 2, 4, 5],
        "repeat": [0, 1, 2, 3, 3, 4, 5],
        "other step": [0, 1, 2, 3, 4, 6],
    }
    for name, steps in variants.items():
        ledger = BatchLedger()
        for step in steps:
            ledger.add(step, *batch(step))
        assert ledger.total(ALONE) != expected, name
    swapped = BatchLedger()
    for step in range(STEPS):
        swapped.add(step, *batch({2: 3, 3: 2}.get(step, step)))
    assert swapped.total(ALONE) != expected


@given(
    step=st.integers(0, 2**40),
    samples=st.lists(st.integers(0, 2**40), min_size=2, max_size=20, unique=True),
)
def test_it_notices_two_rows_that_change_places(step: int, samples: list[int]) -> None:
    positions = torch.arange(len(samples))
    ids = torch.tensor(samples)
    other = ids.clone()
    other[[0, 1]] = ids[[1, 0]]
    assert marks_of(step, positions, ids) != marks_of(step, positions, other)
    # The order in which rows are added up does not matter.
    turned = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    assert marks_of(step, positions, ids) == marks_of(step, positions[turned], ids[turned])
