"""ENTRY: train an embedding. Read from `train` downwards.

All of these run the same `main`, with ranks from the environment alone:
`deepspeed dist_dml/train.py --config F a.b=v`, `torchrun ... dist_dml/train.py`,
`python -m dist_dml.train`, `srun python -m dist_dml.train`, `dist-dml train`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # Run by path: this folder must not hide installed packages.
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from dist_dml.agreement import check_agreement, epoch_facts
from dist_dml.checkpoint import Contents, save_checkpoint
from dist_dml.checkpoint_manifest import Progress, prune_checkpoints
from dist_dml.command_line import run_command
from dist_dml.config import Config
from dist_dml.config_loading import Resolved, config_hash, to_yaml
from dist_dml.damage_report import DamageReport
from dist_dml.data.batch_making import Batch
from dist_dml.data.damage import Damage
from dist_dml.data.loader import training_batches
from dist_dml.engine import Engine
from dist_dml.entry import add_config_arguments, run_worker
from dist_dml.errors import RunError
from dist_dml.evaluate import tables, write_certificates, write_gallery
from dist_dml.journal import Journal
from dist_dml.keyed_random import key_of, row_keys
from dist_dml.measurement import Model, embed_with, measure_model
from dist_dml.parallel.classifier import ClassParallelClassifier
from dist_dml.parallel.heads import Head, ObjectiveOutput
from dist_dml.parallel.proxy_head import ProxyHead
from dist_dml.parallel.time_budget import TimeBudget
from dist_dml.parallel.world import World
from dist_dml.proxy_pool import prepare_proxies
from dist_dml.resources import peak_mebibytes
from dist_dml.schedule import learning_rate_factor
from dist_dml.training_diagnosis import TrainingDiagnosis
from dist_dml.training_run import TrainingRun, prepare, starting_loss_warning


def train(resolved: Resolved, world: World, arguments: argparse.Namespace) -> None:
    """Train, evaluate and save as configured; called by all workers together."""
    config = resolved.config
    run = prepare(config, world)
    journal = Journal(config, run, world)
    warning = starting_loss_warning(config, run.head.partition.num_classes)
    if warning:
        journal.say(warning)
    ended = run.ended_by(config)
    if ended:
        journal.say(f"{run.folder} {ended}")
    try:
        if not ended:
            loop(config, run, world, journal)
    except BaseException as error:
        journal.fail("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        run.head.close()
    journal.finish(config, run)


def loop(config: Config, run: TrainingRun, world: World, journal: Journal) -> None:
    """The training loop. One iteration is one micro-batch; a step ends with a batch's last one."""
    engine, head, plan = run.engine, run.head, run.plan
    progress = run.start
    ignored = config.loss.ignore_index
    damage = Damage(run.index, plan.sample_ids, config.data, config.run.seed, ignored)
    report = DamageReport(damage, run.folder, world)
    batches = training_batches(
        run.index,
        plan,
        config.data,
        config.run.seed,
        world.rank,
        world.size,
        progress.step,
        run.total_steps,
        damage,
    )
    diagnosis = TrainingDiagnosis(head, world, ignored, config.tracking.diagnostics)
    proxies = head if isinstance(head, ProxyHead) else None
    limit = config.training.max_seconds
    budget = TimeBudget(limit, progress.seconds, world.device, world.group)
    engine.embedder.train()
    journal.begin(progress)
    for batch in journal.timed(batches):
        if proxies is not None and proxies.phases.finished:
            journal.say("proxies.run_patience without a gain: the run ends with its best weights")
            break
        if proxies is not None:  # Its time is time of training.
            prepare_proxies(proxies, engine.embedder, run.index, plan.sample_ids, config, world)
        if batch.micro == 0 and batch.step % plan.steps_per_epoch == 0:
            facts = epoch_facts(plan, run.index.fingerprint, batch.step, run.total_steps)
            when = f"at the start of epoch {batch.step // plan.steps_per_epoch + 1}"
            check_agreement(when, facts, world)
        last = batch.micro == config.training.accumulate - 1
        factor = learning_rate_factor(batch.step, run.total_steps, config.schedule, budget.share)
        batch_rows = plan.num_rows(batch.step)
        output = train_step(
            batch, engine, head, batch_rows, factor, last, config.run.seed, diagnosis
        )
        journal.add(output)
        if not last:
            continue

        progress = replace(
            progress,
            step=batch.step + 1,
            images_seen=progress.images_seen + batch_rows,
            seconds=journal.training_seconds(),
        )
        epoch, within = divmod(progress.step, plan.steps_per_epoch)
        budget.step_done(progress.seconds)
        ends_epoch = within == 0
        ends_run = progress.step == run.total_steps or budget.share >= 1
        journal.step_done(
            progress,
            epoch,
            factor,
            batch_rows,
            lambda: head.report() | report.metrics() | diagnosis.metrics(),
        )

        is_best = False
        asked = proxies is not None and proxies.phases.evaluation_due
        if ends_run or asked or (ends_epoch and _is_due(epoch, config.evaluation.every_epochs)):
            journal.pause()
            scores = evaluate(config, run, world, journal, progress, ends_run)
            best = scores.get(config.checkpoint.best_metric, -math.inf)
            is_best = best > (progress.best_score if progress.best_score is not None else -1.0)
            if is_best:
                progress = replace(progress, best_score=best, best_step=progress.step)
            if proxies is not None and asked:
                proxies.evaluated(best, engine.embedder)
                if proxies.phases.finished:  # With the best weights, of which the last scores are.
                    ends_run = True
                    evaluate(config, run, world, journal, progress, ends_run)
        # A checkpoint of an epoch's end follows its evaluation, so that it knows the best score.
        if (
            ends_run
            or is_best
            or _is_due(progress.step, config.checkpoint.every_steps)
            or (ends_epoch and _is_due(epoch, config.checkpoint.every_epochs))
        ):
            journal.pause()
            save(config, run, world, progress)
        if ends_run:
            break
        journal.resume(progress)


def train_step(
    batch: Batch,
    engine: Engine,
    head: Head,
    batch_rows: int,
    factor: float,
    last: bool,
    seed: int,
    diagnosis: TrainingDiagnosis,
) -> ObjectiveOutput:
    """One micro-batch: embeddings, exact loss over classes or pairs, gradients, updates at the end.

    Nothing in here waits for the device.

    Args:
        batch: this worker's rows.
        batch_rows: rows of the whole batch, all workers and micro-batches.
        factor: the schedule's factor of the learning rate.
        last: whether the batch is complete with this micro-batch.
        seed: `run.seed`.
        diagnosis: is shown the embeddings.
    """
    device = head.device
    images = batch.images_on(device)
    labels = batch.labels.to(device, non_blocking=True)
    positions = batch.positions.to(device, non_blocking=True)
    # Dropout is keyed by step and position in the batch, not by worker.
    keys = row_keys(key_of(seed, "dropout", batch.step), positions)
    embeddings = engine(images, keys, last)
    diagnosis.note(embeddings, labels, batch.row_counts)
    output = head(embeddings, labels, batch.row_counts, batch_rows, factor=factor, last=last)
    engine.backward(output.loss)
    if isinstance(head, ProxyHead):
        head.phases.pull(engine.embedder)
    engine.step(factor)
    if last:
        head.step_done()
    return ObjectiveOutput(output.loss.detach(), output.num_correct)


def evaluate(
    config: Config,
    run: TrainingRun,
    world: World,
    journal: Journal,
    progress: Progress,
    ends_run: bool,
) -> dict[str, float]:
    """All retrieval scores, recorded; at the end of the run also NMI, the gallery and the table."""
    embedder = run.engine.embedder.eval()
    classifier = run.head if isinstance(run.head, ClassParallelClassifier) else None
    model = Model(embed_with(embedder, config, world), classifier)
    nmi = config.evaluation.nmi and ends_run
    started = time.perf_counter()
    measured = measure_model(model, run.index, config, world, nmi)
    scores = measured.scores
    seconds = time.perf_counter() - started
    costs = {"evaluation/seconds": seconds, "memory/peak_mebibytes": peak_mebibytes(world)}
    journal.record(progress, scores | costs)
    shown = {name: value for name, value in scores.items() if name == config.checkpoint.best_metric}
    journal.say(
        f"step {progress.step}: evaluated in {seconds:.1f} s"
        + "".join(f", {name} {value:.4f}" for name, value in shown.items())
    )
    if world.is_first and measured.certificates:
        path = run.folder / "report" / "certificates.png"
        journal.table = write_certificates(path, measured) + "\n\n"
        journal.note_figure(path)
    if ends_run and world.is_first:
        path = run.folder / "report" / "gallery.png"
        title = f"{config.run.name}: step {progress.step}"
        write_gallery(path, run.index, measured, config, title)
        journal.note_figure(path)
        certificates = journal.table if measured.certificates else ""
        journal.table = certificates + tables({"trained": scores}, config)
    embedder.train()
    return scores


def save(config: Config, run: TrainingRun, world: World, progress: Progress) -> None:
    """Write a checkpoint, then remove those that are no longer kept.

    Raises:
        RunError: if the embedder holds numbers that are not finite: classes are updated before its
            gradient is known, and half a step is never kept.
    """
    for name, parameter in run.engine.embedder.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise RunError(
                f"step {progress.step} left {name} with numbers that are not finite; lower "
                "optimizer.learning_rate or set optimizer.clip_norm, and continue from the last "
                "checkpoint with --resume auto"
            )
    contents = Contents(progress, run.plan_facts, to_yaml(config), config_hash(config))
    folder = run.folder / "checkpoints"
    save_checkpoint(folder, contents, run.engine, run.head, world)
    if world.is_first:
        prune_checkpoints(folder, config.checkpoint.keep_last, progress.best_step)


def _is_due(count: int, every: int) -> bool:
    return every > 0 and count % every == 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--resume", default="", metavar="auto|no|PATH", help="sets run.resume, see there"
    )
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train as one worker of the group that the environment describes. Returns the exit code."""
    return run_worker(train, arguments, [f"run.resume={arguments.resume}"] * bool(arguments.resume))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dist_dml.train ...` and every launcher's entry."""
    return run_command(
        "dist_dml.train", sys.modules[__name__], sys.argv[1:] if argv is None else argv
    )


if __name__ == "__main__":
    from dist_dml.train import main as only_main  # one copy of the module

    sys.exit(only_main())
