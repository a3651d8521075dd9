"""Chance-constrained proxies in real runs: any layout, resumed on another, ended by patience."""

from __future__ import annotations

import pytest
from launching import Launcher

pytestmark = pytest.mark.slow

PROXIES = ["proxies={per_class: 3, pool_size: 4, evaluate_steps: 2, problem_patience: 1}"]
PROXIES += ["loss={name: c2, negative_margin: 0.8}", "data.batch_size=32", "training.max_steps=12"]
# A gain that no evaluation reaches: every second one begins a new problem.
PROXIES += ["proxies.least_gain=1", "proxies.projection=0.05", "model.dropout=0.1"]
PROXIES += ["checkpoint.every_steps=3", "checkpoint.keep_last=9"]


@pytest.mark.parametrize("pool", ["bank", "passes"])
def test_every_layout_trains_alike_and_resumes_on_another_in_the_middle_of_a_problem(
    launcher: Launcher, pool: str
) -> None:
    every = [*PROXIES, f"proxies.pool={pool}"]
    alone = launcher.run("python", 1, *every, "run.name=alone")
    assert alone.exit_code == 0, alone.output
    expected = launcher.losses("alone")
    assert list(expected) == list(range(1, 13))
    several = launcher.run("by hand", 3, *every, "run.name=several")
    assert several.exit_code == 0, several.output
    assert list(launcher.losses("several").values()) == pytest.approx(
        list(expected.values()), rel=1e-4
    )
    # Step 3 lies within the first problem, step 9 within the third, when a solution pulls.
    for step in (3, 9):
        name = f"resumed{step}"
        start = launcher.root / "several" / "checkpoints" / f"step-{step:09d}"
        resumed = launcher.run("by hand", 2, *every, f"run.name={name}", f"run.resume={start}")
        assert resumed.exit_code == 0, resumed.output
        after = launcher.losses(name)
        assert list(after) == list(range(step + 1, 13))
        assert list(after.values()) == pytest.approx([expected[at] for at in after], rel=1e-4)


def test_a_run_ends_with_its_best_weights_when_nothing_gains(launcher: Launcher) -> None:
    arguments = [*PROXIES, "proxies.run_patience=2", "training.max_steps=400"]
    ended = launcher.run("python", 1, *arguments, "run.name=ended")
    assert ended.exit_code == 0, ended.output
    # The first evaluation is a gain, the next two are none.
    assert max(launcher.losses("ended")) == 6
    again = launcher.run("python", 1, *arguments, "run.name=ended", "run.resume=auto")
    assert again.exit_code == 0, again.output
    assert "ends with its best weights" in again.output


def test_what_proxies_cannot_do_is_refused_before_the_first_step(launcher: Launcher) -> None:
    for argument, words in (
        ("loss={name: spce}", "loss.name=spce"),
        ("training.accumulate=2", "training.accumulate"),
        ("checkpoint.best_metric=", "checkpoint.best_metric"),
    ):
        refused = launcher.run("python", 1, *PROXIES, argument, "run.name=refused")
        assert refused.exit_code == 2, refused.output
        assert words in refused.error_lines[0]
