"""Chaos: workers killed at random times, again and again; the training does not notice.

A killed run goes on from its last checkpoint and repeats some steps. What counts is the sequence of
batches that the final weights descend from: the ledger in the manifest has a mark for every row of
every step, and equals that of the plan exactly when none is missing and none is there twice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from launching import Launcher, training_processes
from test_faults_death import saved_step, steps_done

from dist_dml.batch_ledger import ledger_of_plan
from dist_dml.checkpoint_manifest import newest_checkpoint
from dist_dml.config_loading import resolve
from dist_dml.data.opening import open_index, open_plan

pytestmark = pytest.mark.slow

STEPS, KILLS = 400, 20
TRAINING = [
    "data.batch_size=32",
    "training.epochs=1000",
    f"training.max_steps={STEPS}",
    "checkpoint.every_steps=9",
    "checkpoint.every_epochs=0",
    "tracking.diagnostics=false",
    "engine.threads=1",
]


def kill_one(launcher: Launcher, draw: random.Random) -> None:
    """SIGKILL a random worker of the run."""
    draw.choice(sorted(training_processes(launcher.root), key=lambda p: p.pid)).kill()


def moments(draw: random.Random) -> list[tuple[int, float]]:
    """When to kill: steps that the run has come to for the first time, and a while after that.

    Every fifth time the while is long enough for the next attempt's start, if this one is quick.
    """
    steps = sorted(draw.sample(range(5, STEPS - 40), KILLS))
    return [
        (step, draw.uniform(0, 0.3) if number % 5 else draw.uniform(0, 3))
        for number, step in enumerate(steps)
    ]


def written(launcher: Launcher) -> int:
    """Bytes of the records of the run so far."""
    path = launcher.root / "chaos" / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def wait_until(reached: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def assert_all_batches_once(launcher: Launcher, *names: str) -> None:
    """The runs have consumed the plan's batches, each step once."""
    config = resolve(None, [*launcher.settings, *TRAINING]).config
    plan = open_plan(open_index(config.data), config.data, 1, config.run.seed)
    for name in names:
        found = newest_checkpoint(launcher.root / name / "checkpoints")
        assert found is not None
        progress = found[1].progress
        assert progress.step == STEPS
        assert progress.ledger == ledger_of_plan(plan, range(STEPS)), name
        assert progress.images_seen == sum(plan.num_rows(step) for step in range(STEPS))
        assert sorted(launcher.losses(name)) == list(range(1, STEPS + 1))


def test_20_kills_under_torchrun_change_no_bit(launcher: Launcher) -> None:
    whole = launcher.run("torchrun", 2, "run.name=whole", *TRAINING)
    assert whole.exit_code == 0, whole.output
    words = launcher.command("torchrun", 2, [*launcher.settings, *TRAINING, "run.name=chaos"])
    words[1:1] = ["--max-restarts", str(KILLS), "--monitor-interval", "0.1"]
    (process,) = launcher.start_words(words)
    draw = random.Random(7)
    for step, seconds in moments(draw):
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


def test_20_kills_and_restarts_on_1_2_and_3_workers_end_within_rounding(
    launcher: Launcher,
) -> None:
    arguments = [*TRAINING, "engine.precision=float64"]
    whole = launcher.run("by hand", 2, "run.name=whole", *arguments)
    assert whole.exit_code == 0, whole.output
    draw = random.Random(11)
    layouts = []
    for step, seconds in [*moments(draw), (STEPS, 0.0)]:
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
            ended = launcher.wait(processes, time.monotonic() + 60)
            assert ended.exit_code == 0, ended.output
            break
        time.sleep(seconds)
        if training_processes(launcher.root):
            kill_one(launcher, draw)
        # The others see it and end by themselves.
        launcher.wait(processes, time.monotonic() + 30)
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
