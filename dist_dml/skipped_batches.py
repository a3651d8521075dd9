"""Batches that a run passes over: `skipped.json` in its folder, and going back to before them."""

from __future__ import annotations

from pathlib import Path

from dist_dml.checkpoint_manifest import checkpoint_steps, remove_checkpoint
from dist_dml.config import TrainingConfig
from dist_dml.errors import NotFiniteError, RunError
from dist_dml.tracking.run_files import read_json
from dist_dml.whole_files import write_json

_FILE = "skipped.json"


def skipped_steps(folder: Path) -> tuple[int, ...]:
    """The steps whose batches the run in `folder` passes over, ascending; from 0, as plans count.

    A file that is no longer what was written counts as absent: the loss then tells again.
    """
    steps = read_json(folder / _FILE).get("steps", [])
    if not isinstance(steps, list) or not all(type(step) is int for step in steps):
        return ()
    return tuple(sorted(steps))


def check_rollback(
    config: TrainingConfig, found: NotFiniteError, skipped: tuple[int, ...], advice: str
) -> None:
    """Whether the run may go back and pass over the batch.

    Args:
        config: the training section.
        found: what was found, and in which step.
        skipped: steps that are passed over already.
        advice: what to do if not, and where the report lies.

    Raises:
        RunError: if going back is not configured, would not help, or was done too often.
    """
    if config.rollback_checkpoints == 0:
        raise RunError(f"{found.finding}; {advice}") from None
    if len(skipped) >= config.max_skipped:
        raise RunError(
            f"{found.finding}, and training.max_skipped={config.max_skipped} batches have been "
            f"passed over already; {advice}"
        ) from None


def roll_back(folder: Path, step: int, num_checkpoints: int) -> str:
    """Note that the batch of a step is passed over, and leave the nth newest checkpoint as the
    newest; without so many, none. By worker 0.

    In this order, so that a run that is killed in between meets the batch with the note.

    Args:
        folder: of the run.
        step: from 0, as plans count.
        num_checkpoints: n.

    Returns:
        Where training goes on, in words.
    """
    write_json(folder / _FILE, {"steps": sorted({*skipped_steps(folder), step})})
    checkpoints = folder / "checkpoints"
    steps = checkpoint_steps(checkpoints)
    for newer in steps[len(steps) - num_checkpoints + 1 :]:
        remove_checkpoint(checkpoints, newer)
    if len(steps) < num_checkpoints:
        for newer in steps:
            remove_checkpoint(checkpoints, newer)
        return "the start"
    return f"the checkpoint of step {steps[-num_checkpoints]}"
