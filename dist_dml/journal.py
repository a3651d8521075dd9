"""What the training loop writes and shows, and the times it measures."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dist_dml.checkpoint_manifest import Progress
from dist_dml.checkpoint_writer import Saved
from dist_dml.config import Config
from dist_dml.data.batch_making import Batch
from dist_dml.engine import engine_name
from dist_dml.errors import NotFiniteError
from dist_dml.parallel.heads import ObjectiveOutput
from dist_dml.parallel.step_watch import StepWatch
from dist_dml.parallel.world import World
from dist_dml.tracking.live import LiveLine
from dist_dml.tracking.load_sampler import start_load_sampler, stop_load_sampler
from dist_dml.tracking.mirror import Mirror, start_mirror
from dist_dml.tracking.plots import save_figure, training_curves
from dist_dml.tracking.recorder import Recorder, read_metrics
from dist_dml.tracking.run_files import identify_run
from dist_dml.training_run import TrainingRun, run_facts

# How long the end of a run waits for MLflow to take the last records. Nothing is lost after it.
_MIRROR_SECONDS = 60.0


@dataclass(frozen=True)
class _Step:
    """A finished step whose numbers are still on the device: one loss a micro-batch."""

    progress: Progress
    rows: int
    losses: list[Tensor]
    corrects: list[Tensor]
    gradient_norms: Tensor


class Journal:
    """Records of the loop. All workers keep one, worker 0 alone writes and shows.

    Losses stay on the device until the log is due and are then fetched together, each under its own
    step; every worker looks whether they are finite, as all see the same.
    """

    def __init__(self, config: Config, run: TrainingRun, world: World, watch: StepWatch) -> None:
        """Worker 0 opens the files and starts the mirror to MLflow, which takes milliseconds."""
        self._watch = watch
        self._every_steps = config.tracking.every_steps
        self._learning_rate = config.optimizer.learning_rate
        self._writes = world.is_first
        self._outputs: list[ObjectiveOutput] = []
        self._steps: list[_Step] = []
        self._gradient_names = run.engine.gradient_names
        self._images = 0
        self._seconds_before = run.start.seconds
        self._running_since: float | None = None
        self._seconds = 0.0
        self._flushed_seconds = 0.0
        self._wait_seconds = 0.0
        self._flushed_wait = 0.0
        self._recorder: Recorder | None = None
        self._mirror: Mirror | None = None
        self._saves_failed = 0
        self._line: LiveLine | None = None
        self.table = ""
        self._sampler: subprocess.Popen[bytes] | None = None
        if not self._writes:
            ranks, tracking = world.ranks, config.tracking
            if ranks.local_rank == 0 and tracking.mlflow and tracking.system_metrics:
                self._sampler = start_load_sampler(run.folder, ranks.rank // ranks.local_size)
            return
        self._recorder = Recorder(run.folder)
        identify_run(run.folder, run_facts(config, run))
        self._recorder.note_artifact(run.folder / "config.yaml")
        if config.tracking.mlflow:
            root = Path(config.run.root)
            self._mirror = start_mirror(run.folder, config.tracking, root, config.run.name)
        self._line = LiveLine(
            run.total_steps,
            max_seconds=config.training.max_seconds,
            training_seconds=self.training_seconds,
        )
        self._line.message(_headline(config, run, world))

    def begin(self, progress: Progress) -> None:
        """Start the training clock."""
        self._running_since = time.perf_counter()
        if self._line is not None:
            self._line.begin(progress.step, progress.images_seen, self._wait_seconds)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time spent waiting for each added up."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            batch = next(iterator, None)
            self._wait_seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def add(self, output: ObjectiveOutput) -> None:
        """Take one micro-batch's loss, without fetching it."""
        self._outputs.append(output)

    def training_seconds(self) -> float:
        """Training time of all runs together, without evaluations and checkpoints."""
        running = 0.0
        if self._running_since is not None:
            running = time.perf_counter() - self._running_since
        return self._seconds_before + self._seconds + running

    def step_done(
        self,
        progress: Progress,
        epoch: int,
        factor: float,
        rows: int,
        gradient_norms: Float[Tensor, " p"],
        also: Callable[[], dict[str, float]],
    ) -> None:
        """Close a step; every `tracking.every_steps` write down those since the last time.

        Args:
            progress: after the step.
            epoch: epochs that are done.
            factor: the schedule's factor of the learning rate.
            rows: of the step's batch.
            gradient_norms: of the embedder's update, see `Engine.gradient_norms`.
            also: further numbers, asked for when they are written down.

        Raises:
            NotFiniteError: if a loss or a gradient is not finite.
        """
        losses = [output.loss for output in self._outputs]
        corrects = [out.num_correct for out in self._outputs if out.num_correct is not None]
        self._steps.append(_Step(progress, rows, losses, corrects, gradient_norms))
        self._outputs = []
        self._images += rows
        loss = None
        if progress.step % self._every_steps == 0:
            rate = factor * self._learning_rate
            loss = self._flush({"train/learning_rate": rate, "train/epoch": epoch, **also()})
        if self._line is not None:
            self._line.update(
                progress.step, epoch, progress.images_seen, self._wait_seconds, loss=loss
            )

    def pause(self) -> None:
        """Stop the clock for an evaluation or a checkpoint; what is pending is written first.

        Raises:
            NotFiniteError: if a loss or a gradient is not finite: such a model must be neither
                scored nor saved.
        """
        self._flush({})
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
            self._running_since = None

    def resume(self, progress: Progress) -> None:
        """Start the clock again, if it was stopped."""
        if self._running_since is None:
            self.begin(progress)

    def _flush(self, also: Mapping[str, float]) -> float | None:
        """Fetch the pending losses in one transfer and record them. Returns the last loss."""
        if not self._steps:
            return None
        losses = torch.stack([torch.stack(step.losses).sum() for step in self._steps]).tolist()
        corrects = [0.0] * len(losses)
        if has_accuracy := bool(self._steps[0].corrects):
            sums = [torch.stack(step.corrects).sum() for step in self._steps]
            corrects = torch.stack(sums).tolist()
        totals = [torch.linalg.vector_norm(step.gradient_norms) for step in self._steps]
        norms = torch.stack(totals).tolist()
        for step, loss, norm, correct in zip(self._steps, losses, norms, corrects, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._not_finite(step, loss, norm)
            accuracy = {"train/accuracy": correct / step.rows} if has_accuracy else {}
            self.record(step.progress, {"train/loss": loss, **accuracy})
        now = self.training_seconds() - self._seconds_before
        seconds = max(now - self._flushed_seconds, 1e-9)
        wait = self._wait_seconds - self._flushed_wait
        rates = {
            "train/gradient_norm": norms[-1],
            "train/images_per_second": self._images / seconds,
            "train/data_wait_share": min(1.0, wait / seconds),
        }
        self.record(self._steps[-1].progress, {**rates, **also})
        self._steps, self._images = [], 0
        self._flushed_seconds, self._flushed_wait = now, self._wait_seconds
        return losses[-1]

    def _not_finite(self, step: _Step, loss: float, norm: float) -> NotFiniteError:
        """What is known of a step and of those before it that were not written down yet."""
        found, number = [], step.progress.step
        if not math.isfinite(loss):
            found.append(f"the loss of step {number} is {loss}")
        if not math.isfinite(norm):
            found.append(f"the gradient of step {number} has the norm {norm}")
        before = [entry for entry in self._steps if entry.progress.step <= number]
        norms = {
            entry.progress.step: dict(
                zip(self._gradient_names, entry.gradient_norms.tolist(), strict=True)
            )
            for entry in before
        }
        return NotFiniteError(number, " and ".join(found), {"loss": loss, "gradient_norms": norms})

    def passed_over(self, progress: Progress, text: str) -> None:
        """A step whose batch is left out: it has no numbers."""
        self.say(text)
        self.record(progress, {"train/skipped_batches": float(len(progress.skipped))})

    def saved(self, progress: Progress, outcome: Saved) -> None:
        """Record how a save ended, and say so if it failed."""
        if outcome.problem:
            self.say(f"warning: step {outcome.step}: {outcome.problem}; training goes on")
        self._saves_failed += bool(outcome.problem)
        self.record(
            progress,
            {
                "checkpoint/seconds": outcome.seconds,
                "checkpoint/blocked_seconds": outcome.blocked_seconds,
                "checkpoint/failed": float(self._saves_failed),
            },
        )

    def rewind(self, run: TrainingRun) -> None:
        """Training goes on from an earlier step, with what was measured since forgotten."""
        self._gradient_names = run.engine.gradient_names
        self._outputs, self._steps, self._images = [], [], 0
        self._seconds_before, self._seconds, self._running_since = run.start.seconds, 0.0, None
        self._flushed_seconds, self._flushed_wait = 0.0, self._wait_seconds

    def record(self, progress: Progress, values: dict[str, float]) -> None:
        """Write numbers under a step (worker 0)."""
        if self._recorder is not None:
            with self._watch.inside("tracker"):
                self._recorder.record(progress.step, progress.images_seen, progress.seconds, values)

    def say(self, text: str) -> None:
        """Show a line above the progress (worker 0)."""
        if self._line is not None:
            self._line.message(text)

    @contextlib.contextmanager
    def drawing(self, path: Path) -> Iterator[None]:
        """A picture is drawn and mirrored to MLflow; one that a full disk refuses ends no run."""
        try:
            yield
        except OSError as error:
            self.say(f"warning: {path} could not be written ({error.strerror}); the run goes on")
            return
        if self._recorder is not None:
            self._recorder.note_figure(path)

    def fail(self, status: str) -> None:
        """Leave in bad order: the mirror sees it and ends by itself, the error is told
        elsewhere."""
        self._end_sampler()
        if self._line is not None:
            self._line.close()
        if self._recorder is not None:
            self._recorder.note_end(status)
            self._recorder.close()

    def finish(self, config: Config, run: TrainingRun) -> None:
        """Draw the curves, wait a bounded time for MLflow, print scores and where all lies."""
        self._end_sampler()
        if self._recorder is None or self._line is None:
            return
        self._line.close()
        path = run.folder / "report" / "curves.png"
        with self.drawing(path):
            save_figure(training_curves(read_metrics(run.folder), config.run.name), path)
        self._recorder.note_end("FINISHED")
        self._recorder.close()
        missing = None
        if self._mirror is not None:
            # The other workers wait as well.
            patience = min(_MIRROR_SECONDS, config.engine.timeout_seconds / 2)
            missing = self._mirror.finish(patience)
        if self.table:
            print(f"\n{self.table}\n")
        print(f"run:         {run.folder}/ (metrics.jsonl, checkpoints/, report/)")
        if config.tracking.mlflow:
            print(missing or f"MLflow:      dist-dml ui --root {config.run.root}")
        sys.stdout.flush()

    def _end_sampler(self) -> None:
        if self._sampler is not None:
            stop_load_sampler(self._sampler)
            self._sampler = None


def _headline(config: Config, run: TrainingRun, world: World) -> str:
    """What is about to run, on one line."""
    parameters = sum(p.numel() for p in run.engine.embedder.parameters())
    partition = run.head.partition
    limit = config.training.max_seconds
    limit = f" or {limit:g} s" if limit else ""
    start = f", from step {run.start.step}" if run.start.step else ""
    return (
        f"{run.folder}: {run.total_steps} steps{limit}{start} of {config.data.batch_size} images, "
        f"{partition.num_classes} classes over {world.size} worker(s) "
        f"({partition.size} on the first), {parameters / 1e6:.2f} M backbone parameters, "
        f"{engine_name(config, world)} on {world.device.type}, {config.engine.precision}"
    )
