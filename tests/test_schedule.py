"""The learning-rate factor against formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dist_dml.config import ScheduleConfig
from dist_dml.schedule import learning_rate_factor


def factors(total_steps: int, **settings: Any) -> list[float]:
    config = ScheduleConfig(**settings)
    return [learning_rate_factor(step, total_steps, config) for step in range(total_steps)]


def test_cosine_with_100_warm_up_steps_is_paper_bs_formula() -> None:
    total = 1000
    got = factors(total, name="cosine", warmup_steps=100)
    paper = [min((i + 1) / 100, (1 + math.cos(math.pi * i / total)) / 2) for i in range(total)]
    assert got == pytest.approx(paper, rel=1e-12, abs=0)
    assert got[0] == 0.01
    assert got[500] == pytest.approx(0.5)


def test_a_cosine_shorter_than_its_warm_up_takes_the_smaller_of_both() -> None:
    got = factors(20, name="cosine", warmup_steps=100)
    assert got[0] == 0.01
    # The cosine falls below the rising warm-up before the end: no jump, and never above either.
    cosine = [(1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)]
    assert got == pytest.approx([min((i + 1) / 100, cosine[i]) for i in range(20)])
    assert got[19] == pytest.approx(cosine[19])
    assert cosine[19] < 20 / 100


def test_the_cosine_ends_at_its_final_factor() -> None:
    got = factors(10_000, name="cosine", final_factor=0.2)
    assert got[0] == 1.0
    assert got[5_000] == pytest.approx(0.6)
    assert got[-1] == pytest.approx(0.2, abs=1e-6)
    assert got == sorted(got, reverse=True)


def test_step_multiplies_by_decay_at_each_milestone() -> None:
    got = factors(8, name="step", milestones=(0.5, 0.75), decay=0.1)
    assert got == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    # A milestone between two steps takes effect at the next one.
    assert factors(3, name="step", milestones=(0.5,), decay=0.5) == [1, 1, 0.5]


def test_warm_up_rises_to_a_constant() -> None:
    assert factors(6, name="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(3, name="constant") == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["constant", "cosine", "step"])
def test_every_factor_lies_in_0_exclusive_to_1(name: str) -> None:
    for total in (1, 2, 7, 500):
        for warmup in (0, 1, 10):
            assert all(0 < f <= 1 for f in factors(total, name=name, warmup_steps=warmup))


def test_the_share_of_time_counts_where_it_is_more_than_that_of_steps() -> None:
    config = ScheduleConfig(name="cosine")
    assert learning_rate_factor(0, 100, config, 0.5) == pytest.approx(0.5)
    assert learning_rate_factor(75, 100, config, 0.5) == learning_rate_factor(75, 100, config)
    # Workers learn a step late that time is over.
    assert 0 < learning_rate_factor(3, 100, config, 1.2) < 1e-5
    down = ScheduleConfig(name="step", milestones=(0.6,), decay=0.1)
    assert [learning_rate_factor(1, 100, down, share) for share in (0.59, 0.6)] == [1.0, 0.1]
