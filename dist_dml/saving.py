"""When a training is saved: half a step never, the last step always, and what a failure costs."""

from __future__ import annotations

import torch

from dist_dml.checkpoint import Contents
from dist_dml.checkpoint_manifest import Progress
from dist_dml.checkpoint_writer import CheckpointWriter
from dist_dml.config import Config
from dist_dml.config_loading import config_hash, to_yaml
from dist_dml.errors import NotFiniteError, RunError
from dist_dml.journal import Journal
from dist_dml.training_run import TrainingRun


def save(config: Config, run: TrainingRun, progress: Progress, writer: CheckpointWriter) -> None:
    """Begin to write a checkpoint, after which those that are no longer kept are removed.

    Raises:
        NotFiniteError: if the embedder holds numbers that are not finite: classes are updated
            before its gradient is known, and half a step is never kept.
    """
    for name, parameter in run.engine.embedder.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NotFiniteError(
                progress.step, f"step {progress.step} left {name} with numbers that are not finite"
            )
    contents = Contents(progress, run.plan_facts, to_yaml(config), config_hash(config))
    writer.save(contents, run.engine, run.head)


def finish_saving(progress: Progress, journal: Journal, writer: CheckpointWriter) -> None:
    """Wait for the run's last checkpoint, without which it must not end as if all were well.

    Raises:
        RunError: it could not be written.
    """
    writer.wait()
    outcomes = writer.news()
    for outcome in outcomes:
        journal.saved(progress, outcome)
    if problem := outcomes[-1].problem:
        raise RunError(f"step {progress.step}: {problem}")
