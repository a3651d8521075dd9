"""After a loss or gradient that is not finite: the report, and the way back past its batch."""

from __future__ import annotations

from pathlib import Path

from dist_dml.config import Config
from dist_dml.errors import NotFiniteError
from dist_dml.journal import Journal
from dist_dml.not_finite import write_report
from dist_dml.parallel.collectives import barrier
from dist_dml.parallel.world import World
from dist_dml.skipped_batches import check_rollback, roll_back
from dist_dml.training_run import TrainingRun


def step_to_pass_over(
    found: NotFiniteError, config: Config, run: TrainingRun, world: World, journal: Journal
) -> int:
    """Write the report and name the batch, by its step from 0. By all workers together.

    Raises:
        RunError: the run does not go back, as configured or because it did so too often.
    """
    report = write_report(found, config, run, world)
    advice = (
        f"{report}; lower optimizer.learning_rate or set optimizer.clip_norm, or let it pass over "
        "such batches with training.rollback_checkpoints=1, and continue from the last checkpoint "
        "with --resume auto"
    )
    check_rollback(config.training, found, run.start.skipped, advice)
    journal.say(f"warning: {found.finding}; {report}")
    return found.step - 1


def go_back(folder: Path, step: int, config: Config, world: World, journal: Journal) -> None:
    """Make an earlier checkpoint the newest and note the batch. By all workers together."""
    if world.is_first:
        place = roll_back(folder, step, config.training.rollback_checkpoints)
        journal.say(f"going back to {place}, to pass over the batch of step {step + 1}")
    barrier(world.group)
