"""What workers agree on after each step: one clock, and whether somebody asks to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worker_group import run_workers

from dist_dml.parallel.step_agreement import StepAgreement


def never() -> bool:
    return False


def test_one_process_goes_by_its_own_clock() -> None:
    agreement = StepAgreement(10.0, 4.0, never, None)
    assert agreement.share == 0.4
    agreement.step_done(9.0)
    assert agreement.share == 0.9
    agreement.step_done(10.5)
    assert agreement.share == 1.05


def test_without_a_limit_nothing_is_ever_spent() -> None:
    agreement = StepAgreement(0.0, 4.0, never, None)
    agreement.step_done(1e9)
    assert agreement.share == 0.0


def test_one_process_stops_after_the_step_in_which_it_was_asked() -> None:
    asked = [False]
    agreement = StepAgreement(0.0, 0.0, lambda: asked[0], None)
    agreement.step_done(1.0)
    assert not agreement.stop
    asked[0] = True
    agreement.step_done(2.0)
    assert agreement.stop


def seen_by_worker(rank: int, size: int, group: Any) -> tuple[list[float], list[bool]]:
    """What a worker sees whose clock runs `rank + 1` times as fast; the last one is asked to stop
    in the third step.
    """
    step = 0
    agreement = StepAgreement(10.0, 2.0, lambda: rank == size - 1 and step == 3, group)
    shares, stops = [agreement.share], [agreement.stop]
    for step in (1, 2, 3, 4):
        agreement.step_done(2.0 + 3.0 * step * (rank + 1))
        shares.append(agreement.share)
        stops.append(agreement.stop)
    agreement.step_done(0.0)  # The last message is taken before the group ends.
    return shares, stops


@pytest.mark.parametrize("num_workers", [2, 3])
def test_all_workers_see_worker_0s_clock_and_anyones_wish_a_step_late(
    num_workers: int, tmp_path: Path
) -> None:
    for shares, stops in run_workers(seen_by_worker, num_workers, tmp_path):
        assert shares == pytest.approx([0.2, 0.2, 0.5, 0.8, 1.1])
        assert stops == [False, False, False, False, True]
