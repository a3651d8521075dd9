"""Chaos: workers killed at random times, again and again; the training does not notice.

A killed run goes on from its last checkpoint and repeats some steps. What counts is the sequence of
batches that the final weights descend from: the ledger in the manifest has a mark for every row of
every step, and equals that of the plan exactly when none is missing and none is there twice.
"""

from __future__ import annotations

import random
import time

import pytest
import torch
from chaos import TRAINING, assert_all_batches_once, kill_one, moments, wait_until
from launching import Launcher, training_processes
from test_faults_death import steps_done

pytestmark = pytest.mark.slow

# Each costs the start of two workers; 20 kills passed on 2026-11-21 (288 s), with other layouts in
# test_chaos_layouts.py they are 20.
KILLS = 3


def test_kills_at_random_times_under_torchrun_change_no_bit(launcher: Launcher) -> None:
    whole = launcher.run("by hand", 2, "run.name=whole", *TRAINING)
    assert whole.exit_code == 0, whole.output
    words = launcher.command("torchrun", 2, [*launcher.settings, *TRAINING, "run.name=chaos"])
    words[1:1] = ["--max-restarts", str(KILLS), "--monitor-interval", "0.1"]
    (process,) = launcher.start_words(words)
    draw = random.Random(7)
    for step, seconds in moments(draw, KILLS):
        wait_until(
            lambda step=step: steps_done(launcher, "chaos") >= step or process.poll() is not None,
            f"the run did not come to step {step}",
        )
        time.sleep(seconds)
        wait_until(lambda: bool(training_processes(launcher.root)), "no worker was started")
        kill_one(launcher, draw)
    ended = launcher.wait([process], time.monotonic() + 180)
    assert ended.exit_code == 0, ended.output
    assert_all_batches_once(launcher, "whole", "chaos")
    assert launcher.losses("chaos") == launcher.losses("whole")
    actual, expected = launcher.tensors("chaos"), launcher.tensors("whole")
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
    # Another launch, even of the same command, is a new run and is refused.
    second = launcher.run("by hand", 2, "run.name=chaos", *TRAINING)
    assert second.exit_code != 0
    assert "holds a run already" in second.output
