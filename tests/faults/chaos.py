"""What the two chaos tests share: when to kill whom, and what must be true in the end."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from launching import Launcher, training_processes

from dist_dml.batch_ledger import ledger_of_plan
from dist_dml.checkpoint_manifest import newest_checkpoint
from dist_dml.config_loading import resolve
from dist_dml.data.opening import open_index, open_plan

STEPS = 240
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


def moments(draw: random.Random, kills: int) -> list[tuple[int, float]]:
    """When to kill: steps that the run has come to for the first time, and a while after that.

    Every fifth time the while is long enough for the next attempt's start, if this one is quick.
    """
    steps = sorted(draw.sample(range(5, STEPS - 40), kills))
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
