"""A training's time: one clock for all workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from worker_group import run_workers

from dist_dml.parallel.time_budget import TimeBudget

CPU = torch.device("cpu")


def test_one_process_goes_by_its_own_clock() -> None:
    budget = TimeBudget(10.0, 4.0, CPU, None)
    assert budget.share == 0.4
    budget.step_done(9.0)
    assert budget.share == 0.9
    budget.step_done(10.5)
    assert budget.share == 1.05


def test_without_a_limit_nothing_is_ever_spent() -> None:
    budget = TimeBudget(0.0, 4.0, CPU, None)
    budget.step_done(1e9)
    assert budget.share == 0.0


def shares_of_worker(rank: int, size: int, group: Any) -> list[float]:
    """What a worker whose clock runs `rank + 1` times as fast sees after each of four steps."""
    budget = TimeBudget(10.0, 2.0, CPU, group)
    shares = [budget.share]
    for step in (1, 2, 3, 4):
        budget.step_done(2.0 + 3.0 * step * (rank + 1))
        shares.append(budget.share)
    budget.step_done(0.0)  # The last message is taken before the group ends.
    return shares


@pytest.mark.parametrize("num_workers", [2, 3])
def test_all_workers_see_worker_0s_clock_a_step_late(num_workers: int, tmp_path: Path) -> None:
    found = run_workers(shares_of_worker, num_workers, tmp_path)
    expected = [0.2, 0.2, 0.5, 0.8, 1.1]
    for shares in found:
        assert shares == pytest.approx(expected)
