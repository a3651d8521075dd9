"""Chaos across layouts: killed at random times, started again on 1, 2 or 3 workers, in float64."""

from __future__ import annotations

import random
import time

import pytest
import torch
from chaos import (
    STEPS,
    TRAINING,
    assert_all_batches_once,
    kill_one,
    moments,
    wait_until,
    written,
)
from launching import Launcher, training_processes
from test_faults_death import saved_step, steps_done

pytestmark = pytest.mark.slow

KILLS = 20


def test_20_kills_and_restarts_on_1_2_and_3_workers_end_within_rounding(
    launcher: Launcher,
) -> None:
    arguments = [*TRAINING, "engine.precision=float64"]
    whole = launcher.run("by hand", 2, "run.name=whole", *arguments)
    assert whole.exit_code == 0, whole.output
    draw = random.Random(11)
    layouts = []
    for step, seconds in [*moments(draw, KILLS), (STEPS, 0.0)]:
        workers = draw.choice([1, 2, 2, 3])
        layouts.append(workers)
        words = ["run.name=chaos", "--resume", "auto", *arguments]
        before = written(launcher)
        processes = launcher.start("by hand", workers, *words)

        def over(step: int = step, processes: list = processes, before: int = before) -> bool:
            # Not before it trains: without a launcher, a worker that dies before they have met is
            # missed only when the meeting's time is up. The other test kills then, too.
            ended = all(process.poll() is not None for process in processes)
            trains = written(launcher) > before
            return ended or (trains and steps_done(launcher, "chaos") >= step)

        wait_until(over, f"the run did not come to step {step}")
        if step == STEPS:
            ended = launcher.wait(processes, time.monotonic() + 120)
            assert ended.exit_code == 0, ended.output
            break
        time.sleep(seconds)
        if training_processes(launcher.root):
            kill_one(launcher, draw)
        # The others see it and end by themselves.
        launcher.wait(processes, time.monotonic() + 90)
        assert not training_processes(launcher.root)
    assert set(layouts) == {1, 2, 3}
    assert saved_step(launcher, "chaos") == STEPS
    assert_all_batches_once(launcher, "whole", "chaos")
    actual, expected = launcher.tensors("chaos"), launcher.tensors("whole")
    assert actual.keys() == expected.keys()
    largest = max(float((actual[key] - expected[key]).abs().max()) for key in expected)
    print(f"layouts {layouts}: weights differ by at most {largest:.2g}")
    assert expected["classes/weight"].dtype == torch.float64
    assert largest <= 1e-8
