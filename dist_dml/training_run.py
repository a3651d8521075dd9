"""Everything that must hold before the first step: folder, data, model, state to resume from."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_dml.agreement import check_agreement, epoch_facts
from dist_dml.checkpoint import remove_unfinished
from dist_dml.checkpoint_manifest import Manifest, Progress, newest_checkpoint, verify_checkpoint
from dist_dml.config import Config
from dist_dml.config_loading import config_hash, to_yaml
from dist_dml.data.index import Index
from dist_dml.data.opening import open_index, open_plan
from dist_dml.data.plan import Plan
from dist_dml.engine import Engine
from dist_dml.errors import UsageError
from dist_dml.measurement import check_evaluation
from dist_dml.metric_parameters import MetricParameters
from dist_dml.models.embedder import build_embedder
from dist_dml.parallel.class_partition import ClassPartition
from dist_dml.parallel.collectives import gather_objects
from dist_dml.parallel.heads import Head
from dist_dml.parallel.world import World
from dist_dml.resources import check_disk, check_memory
from dist_dml.restarts import launch_identity, restart_count
from dist_dml.resuming import restore
from dist_dml.run_lock import RunLock
from dist_dml.skipped_batches import skipped_steps
from dist_dml.tracking.run_files import IDENTITY, check_kind, identify_run, read_json
from dist_dml.training_head import build_head, label_sets_of, sum_dtype

# A start this many times above that of p = 1 is worth a word.
_FAR_ABOVE = 5.0


@dataclass(frozen=True)
class TrainingRun:
    """What the loop works with.

    Attributes:
        folder: the run folder.
        total_steps: optimizer steps of the whole training.
        start: where training stands: the beginning, or the checkpoint that was resumed from.
        plan_facts: what the order of samples depends on; stored with every checkpoint.
    """

    folder: Path
    index: Index
    plan: Plan
    total_steps: int
    engine: Engine
    head: Head
    start: Progress
    plan_facts: dict[str, Any]

    def ended_by(self, config: Config) -> str:
        """Why there is nothing left to train, for a message; empty if there is."""
        if self.start.step >= self.total_steps:
            return f"has done all {self.total_steps} steps; raise training.epochs to go on"
        limit = config.training.max_seconds
        if limit and self.start.seconds >= limit:
            return f"has trained for its {limit:g} seconds; raise training.max_seconds to go on"
        return ""


@dataclass(frozen=True)
class _Found:
    """What worker 0 found in the run folder.

    Attributes:
        start: the checkpoint to go on from, if there is one.
        skipped: steps whose batches are passed over.
    """

    start: tuple[Path, Manifest] | None
    skipped: tuple[int, ...]


def prepare(config: Config, world: World, lock: RunLock, again: bool = False) -> TrainingRun:
    """Refuse what cannot work, then build everything; called by all workers together.

    Args:
        config: of the run.
        world: all workers.
        lock: takes hold of the run folder (worker 0).
        again: this process has trained in the folder already, and goes on from what is there.

    Raises:
        UsageError: for data, layout, folder, checkpoint or disk that cannot carry the run.
    """
    if not config.data.path:
        raise UsageError("data.path is empty; set it to a packed data set (`dist-dml pack --help`)")
    index = open_index(config.data)
    num_classes = config.data.num_classes or index.num_classes
    index.check_labels(config.data.split, num_classes)
    check_evaluation(index, config, num_classes, world.ranks.local_size)
    plan, facts = planned(config, index)
    plan.check_rows(world.size)
    partition = ClassPartition.of_worker(world.rank, world.size, num_classes, world.group)
    total_steps = config.training.epochs * plan.steps_per_epoch
    if config.training.max_steps:
        total_steps = min(total_steps, config.training.max_steps)
    agreed = {"config": config_hash(config), "num_classes": num_classes}
    sets = label_sets_of(config, index, num_classes)
    if sets is not None:
        agreed["label_sets"] = hashlib.sha256(sets.sets.numpy().tobytes()).hexdigest()
    agreed |= epoch_facts(plan, index.fingerprint, 0, total_steps)
    check_agreement("before the first step", agreed, world)

    folder = Path(config.run.root) / config.run.name
    found = gather_objects(_claim_folder(config, folder, world, lock, again), world.group)[0]
    if isinstance(found, UsageError):
        raise found
    assert isinstance(found, _Found)
    embedder = build_embedder(config.model, config.data.image, config.run.seed, world.group)
    embedder = embedder.to(sum_dtype(config))
    check_memory(config, embedder.embedding_dim, partition, world)
    head = build_head(config, embedder.embedding_dim, partition, plan, index, world)
    start, engine = restore(config, world, embedder, head, facts, found.start)
    start = replace(start, skipped=tuple(sorted({*start.skipped, *found.skipped})))
    check_disk(config, folder, embedder, head, world)
    return TrainingRun(folder, index, plan, total_steps, engine, head, start, facts)


def planned(config: Config, index: Index) -> tuple[Plan, dict[str, Any]]:
    """The plan of the training samples, and what their order depends on."""
    plan = open_plan(index, config.data, config.training.accumulate, config.run.seed)
    facts = {
        "fingerprint": index.fingerprint,
        "split": config.data.split,
        **plan.identity(),
        "steps_per_epoch": plan.steps_per_epoch,
    }
    return plan, facts


def _claim_folder(
    config: Config, folder: Path, world: World, lock: RunLock, again: bool
) -> _Found | UsageError | None:
    """Worker 0: find what to resume from, and write the configuration as the first file.

    Returns the error instead of raising it, so that all workers can raise the same one.
    """
    if not world.is_first:
        return None
    try:
        goes_on = again or _is_restart(folder)
        if config.run.resume == "no" and not goes_on:
            _find_start(config, folder, goes_on)  # Refused at once, and not after a wait.
        if folder.is_dir():
            check_kind(folder, "")
            lock.acquire(folder)
        found = _find_start(config, folder, goes_on)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock.acquire(folder)
        remove_unfinished(folder / "checkpoints")
        path = folder / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        if launch := launch_identity():
            identify_run(folder, {"launch": launch})
        return _Found(found, skipped_steps(folder))
    except UsageError as error:
        return error
    except OSError as error:
        return UsageError(
            f"the run folder {folder} cannot be written ({error.strerror}); free the disk or mend "
            "its permissions, or choose another folder with run.root"
        )


def _is_restart(folder: Path) -> bool:
    """Whether the launch that trained here has started its workers again."""
    launch = launch_identity()
    same = read_json(folder / IDENTITY).get("launch") == launch
    return restart_count() > 0 and launch != "" and same


def _find_start(config: Config, folder: Path, goes_on: bool) -> tuple[Path, Manifest] | None:
    resume = config.run.resume
    if goes_on:
        newest = newest_checkpoint(folder / "checkpoints")
        if newest is not None or resume in ("no", "auto"):
            return newest
    if resume not in ("no", "auto"):
        path = Path(resume)
        return path, verify_checkpoint(path)
    newest = newest_checkpoint(folder / "checkpoints") if resume == "auto" else None
    started = folder / "metrics.jsonl"
    taken = started.exists() and started.stat().st_size > 0
    taken = taken or any((folder / "checkpoints").glob("step-*"))
    if resume == "no" and taken:
        raise UsageError(
            f"{folder} holds a run already; continue it with --resume auto, or choose another "
            "run.name"
        )
    return newest


def starting_loss_warning(config: Config, num_classes: int) -> str:
    """What L2 with a small exponent starts from, if that is far above p = 1; otherwise empty."""
    if config.loss.name not in ("l1", "l2"):
        return ""
    parameters = config.loss.metric_parameters
    start = parameters.loss_at_uniform(num_classes)
    usual = MetricParameters(parameters.k, 1.0).loss_at_uniform(num_classes)
    if parameters.p >= 0.99 or start < _FAR_ABOVE * usual:
        return ""
    return (
        f"warning: loss.p={parameters.p:g} with {num_classes} classes starts from a loss of about "
        f"{start:.2g} (p = 1: {usual:.1f}), whose gradient hardly falls; train with p of 0.99 or 1 "
        "and use the small p as the distance of an evaluation"
    )


def run_facts(config: Config, run: TrainingRun) -> dict[str, str]:
    """What identifies the run in MLflow besides its configuration."""
    return {
        "config_hash": config_hash(config),
        "dataset_fingerprint": run.index.fingerprint,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str:
    """The commit of this source tree; empty where it was installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
