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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dist_dml.agreement import check_agreement, epoch_facts
from dist_dml.batch_ledger import BatchLedger
from dist_dml.checkpoint_manifest import Progress
from dist_dml.checkpoint_writer import CheckpointWriter
from dist_dml.command_line import run_command
from dist_dml.config import Config
from dist_dml.config_loading import Resolved
from dist_dml.damage_report import DamageReport
from dist_dml.data.batch_making import Batch
from dist_dml.data.damage import Damage
from dist_dml.data.loader import training_batches
from dist_dml.engine import Engine
from dist_dml.entry import add_config_arguments, run_worker
from dist_dml.errors import NotFiniteError, Stopped
from dist_dml.journal import Journal
from dist_dml.keyed_random import key_of, row_keys
from dist_dml.parallel.heads import Head, ObjectiveOutput
from dist_dml.parallel.proxy_head import ProxyHead
from dist_dml.parallel.step_agreement import StepAgreement
from dist_dml.parallel.step_watch import StepWatch
from dist_dml.parallel.world import World
from dist_dml.proxy_pool import prepare_proxies
from dist_dml.recovery import go_back, step_to_pass_over
from dist_dml.run_lock import RunLock
from dist_dml.saving import finish_saving, save
from dist_dml.schedule import learning_rate_factor
from dist_dml.stop_request import StopRequest
from dist_dml.training_diagnosis import TrainingDiagnosis
from dist_dml.training_evaluation import evaluate
from dist_dml.training_run import TrainingRun, prepare, starting_loss_warning

# For a save that is under way when something else fails.
_LAST_SAVE_SECONDS = 3.0
# Signals reach a process, not a run: there is one, and its handlers come before the first worker.
STOP_REQUEST = StopRequest()

Observe = Callable[[Progress, Mapping[str, float], float], None]
"""Takes the progress, the evaluation's scores and the share of the training that is done."""


@dataclass(frozen=True)
class Companions:
    """What accompanies a training from its first step to its last, through every rollback."""

    journal: Journal
    writer: CheckpointWriter
    watch: StepWatch
    request: StopRequest
    observe: Observe | None = None


def train(
    resolved: Resolved, world: World, arguments: argparse.Namespace, observe: Observe | None = None
) -> None:
    """Train, evaluate and save as configured; called by all workers together.

    Args:
        resolved: the configuration.
        world: the workers.
        arguments: of the command line.
        observe: is told of each evaluation on every worker, before its checkpoint is written; what
            it raises ends the training.

    Raises:
        Stopped: somebody asked for it, and the state is saved.
    """
    config = resolved.config
    lock = RunLock()
    run = prepare(config, world, lock)
    watch = StepWatch(world, config.engine.slow_seconds, config.engine.timeout_seconds)
    journal = Journal(config, run, world, watch)
    writer = CheckpointWriter(run.folder / "checkpoints", config.checkpoint, world)
    companions = Companions(journal, writer, watch, STOP_REQUEST, observe)
    if warning := starting_loss_warning(config, run.head.partition.num_classes):
        journal.say(warning)
    ended = run.ended_by(config)
    if ended:
        journal.say(f"{run.folder} {ended}")
    try:
        STOP_REQUEST.hold()
        watch.start()
        while not ended:
            bad_step = attempt(config, run, world, companions)
            if bad_step is None:
                break
            folder = run.folder
            del run  # Two states would not fit where one fills the memory.
            go_back(folder, bad_step, config, world, journal)
            run = prepare(config, world, lock, again=True)
            journal.rewind(run)
    except BaseException as error:
        asked = isinstance(error, (KeyboardInterrupt, Stopped))
        journal.fail("KILLED" if asked else "FAILED")
        raise
    finally:
        watch.stop()
        lock.release()
    journal.finish(config, run)


def attempt(config: Config, run: TrainingRun, world: World, companions: Companions) -> int | None:
    """Train to the end, or to a batch that is to be passed over: its step then, from 0.

    Raises:
        Stopped: see `train`.
        RunError: the last checkpoint could not be written, or something is not finite and the run
            does not go back.
    """
    try:
        stopped = loop(config, run, world, companions)
    except NotFiniteError as found:
        companions.writer.wait()
        return step_to_pass_over(found, config, run, world, companions.journal)
    finally:
        # A failure does not wait long for others, which may be what has failed.
        companions.writer.wait(_LAST_SAVE_SECONDS)
        run.head.close()
    if stopped:
        raise Stopped(
            f"{STOP_REQUEST.name or 'another worker was asked to stop'}: saved step {stopped} of "
            f"{run.total_steps} in {run.folder}; start again with --resume auto",
            together=True,
        )
    return None


def loop(config: Config, run: TrainingRun, world: World, companions: Companions) -> int:
    """The training loop. One iteration is one micro-batch; a step ends with a batch's last one.

    Returns:
        The step at which it was asked to stop, with its checkpoint written; 0 at the run's end.

    Raises:
        NotFiniteError: on all workers together.
        RunError: the last checkpoint could not be written.
    """
    engine, head, plan = run.engine, run.head, run.plan
    journal, writer, watch = companions.journal, companions.writer, companions.watch
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
    ledger = BatchLedger(progress.ledger)
    limit = config.training.max_seconds
    asked_to_stop = companions.request.is_asked
    agreement = StepAgreement(limit, progress.seconds, asked_to_stop, world.control)
    engine.embedder.train()
    journal.begin(progress)
    for batch in journal.timed(watch.fetching(batches, progress.step)):
        watch.at("step", batch.step)
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
        factor = learning_rate_factor(batch.step, run.total_steps, config.schedule, agreement.share)
        batch_rows = plan.num_rows(batch.step)
        left_out = batch.step in progress.skipped
        if not left_out:
            output = train_step(
                batch, engine, head, batch_rows, factor, last, config.run.seed, diagnosis
            )
            journal.add(output)
            ledger.add(batch.step, batch.positions, batch.sample_ids)
        if not last:
            continue

        progress = replace(
            progress,
            step=batch.step + 1,
            images_seen=progress.images_seen + (0 if left_out else batch_rows),
            seconds=journal.training_seconds(),
        )
        epoch, within = divmod(progress.step, plan.steps_per_epoch)
        agreement.step_done(progress.seconds)
        ends_epoch = within == 0
        ends_run = progress.step == run.total_steps or agreement.share >= 1
        watch.at("step", progress.step)
        if left_out:
            journal.passed_over(progress, f"step {progress.step}: its batch is passed over")
        else:
            journal.step_done(
                progress,
                epoch,
                factor,
                batch_rows,
                engine.gradient_norms(),
                lambda: head.report() | report.metrics() | diagnosis.metrics(),
            )
        for outcome in writer.news():
            journal.saved(progress, outcome)

        is_best = False
        asked = proxies is not None and proxies.phases.evaluation_due
        if ends_run or asked or (ends_epoch and _is_due(epoch, config.evaluation.every_epochs)):
            journal.pause()
            watch.at("evaluation", progress.step)
            scores = evaluate(config, run, world, journal, progress, ends_run)
            best = scores.get(config.checkpoint.best_metric, -math.inf)
            is_best = best > (progress.best_score if progress.best_score is not None else -1.0)
            if is_best:
                progress = replace(progress, best_score=best, best_step=progress.step)
            if proxies is not None and asked:
                proxies.evaluated(best, engine.embedder)
                if proxies.phases.finished:  # With the best weights, of which the last scores are.
                    ends_run = True
                    scores = evaluate(config, run, world, journal, progress, ends_run)
            if companions.observe is not None:
                done = max(progress.step / run.total_steps, agreement.share)
                companions.observe(progress, scores, 1.0 if ends_run else done)
        # A checkpoint of an epoch's end follows its evaluation, so that it knows the best score.
        stops = agreement.stop and not ends_run
        if (
            ends_run
            or stops
            or is_best
            or _is_due(progress.step, config.checkpoint.every_steps)
            or (ends_epoch and _is_due(epoch, config.checkpoint.every_epochs))
        ):
            journal.pause()
            watch.at("checkpoint", progress.step)
            progress = replace(progress, ledger=ledger.total(world))
            save(config, run, progress, writer)
            if ends_run or stops:
                finish_saving(progress, journal, writer)
        if ends_run or stops:
            return progress.step if stops else 0
        journal.resume(progress)
    return 0


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
    STOP_REQUEST.install()
    return run_worker(train, arguments, [f"run.resume={arguments.resume}"] * bool(arguments.resume))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m dist_dml.train ...` and every launcher's entry."""
    return run_command(
        "dist_dml.train", sys.modules[__name__], sys.argv[1:] if argv is None else argv
    )


if __name__ == "__main__":
    from dist_dml.train import main as only_main  # one copy of the module

    sys.exit(only_main())
