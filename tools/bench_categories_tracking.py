"""A benchmark in MLflow: one run for all of it, a run below it for every point.

A point is a run folder like that of a training (docs/tracking.md), so that the project's own mirror
sends it: interrupted or repeated, nothing appears twice. The parent's curves have the number that
the benchmark varies as their step: in the UI they are the curves of the whole.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench_head_measure import report_progress

from dist_dml.config import Config, TrackingConfig
from dist_dml.config_loading import config_hash, to_yaml
from dist_dml.errors import RunError, UsageError
from dist_dml.tracking.destination import Destination, destination_of
from dist_dml.tracking.recorder import Recorder, read_metrics
from dist_dml.tracking.run_files import CONFIG, identify_run, last_status
from dist_dml.whole_files import write_text

EXPERIMENT = "benchmarks"
_PARENT_TAG = "mlflow.parentRunId"  # By which MLflow's pages show runs below another.


@dataclass(frozen=True)
class Record:
    """Figures of one moment of a point."""

    step: int
    images_seen: int
    seconds: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """One run of the benchmark.

    Attributes:
        name: of the run.
        tags: for MLflow's filters and its compare page.
        config: of what was measured; None where the folder has one, as that of a training.
        records: its curve; a training has its own, to which these are added.
        folder: of a training that exists; otherwise one is made below `points/`.
        failed: whether it has no figures.
    """

    name: str
    tags: Mapping[str, str]
    config: Config | None = None
    records: Sequence[Record] = ()
    folder: Path | None = None
    failed: bool = False


@dataclass(frozen=True)
class Benchmark:
    """The whole.

    Attributes:
        name: of the parent.
        out: folder of the benchmark.
        tags: of the parent, and of every point.
        curves: records of the parent: the step is what the benchmark varies.
        artifacts: figures and tables.
    """

    name: str
    out: Path
    tags: Mapping[str, str]
    points: Sequence[Point]
    curves: Sequence[Record] = ()
    artifacts: Sequence[Path] = field(default_factory=tuple)


def publish(benchmark: Benchmark, uri: str) -> str:
    """Send what the store lacks. Returns where it is.

    Args:
        benchmark: the whole.
        uri: tracking server or database; empty for `mlflow.db` in the benchmark's folder.

    Raises:
        UsageError: if MLflow is missing, or the address is none.
        RunError: if the store does not answer.
    """
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_LOGGING_LEVEL", "ERROR"),
    ):
        os.environ.setdefault(name, value)
    parent = Point(benchmark.name, {"git_commit": git_commit()}, None, benchmark.curves)
    folder = write_point(benchmark, parent, benchmark.out / "benchmark")
    _note_artifacts(folder, benchmark.artifacts)
    where = _destination(benchmark, uri, benchmark.name)
    parent_id = _send(folder, where)
    for number, one in enumerate(benchmark.points):
        own = benchmark.out / "points" / one.name.replace("/", "-")
        folder = write_point(benchmark, one, one.folder or own, {_PARENT_TAG: parent_id})
        _send(folder, _destination(benchmark, uri, one.name))
        if (number + 1) % 10 == 0 or number + 1 == len(benchmark.points):
            report_progress(f"  MLflow: {number + 1} of {len(benchmark.points)} points")
    return f"{where.shown}, experiment {EXPERIMENT!r}, run {parent_id}"


def _destination(benchmark: Benchmark, uri: str, name: str) -> Destination:
    tracking = TrackingConfig(mlflow_uri=uri, experiment=EXPERIMENT)
    return destination_of(tracking, benchmark.out, name)


def _send(folder: Path, destination: Destination) -> str:
    try:
        from dist_dml.tracking.mlflow_mirror import mirror_once

        return mirror_once(folder, destination)
    except ImportError:
        raise UsageError(
            "--mlflow: mlflow is not installed; run `pip install 'dist_dml[mlflow]'`"
        ) from None
    except (UsageError, RunError):
        raise
    except Exception as error:  # Whatever MLflow raises when the store does not answer.
        reason = " ".join(str(error).split())[:300]
        raise RunError(
            f"MLflow at {destination.shown} did not take {folder} ({reason}); repeat the command "
            "when it answers"
        ) from None


def write_point(
    benchmark: Benchmark, one: Point, folder: Path, facts: Mapping[str, str] | None = None
) -> Path:
    """The point's run folder, with what it lacks. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tags = {**benchmark.tags, **one.tags, **(facts or {})}
    if one.config is not None:
        run = one.config.run.model_copy(update={"name": folder.name, "root": str(folder.parent)})
        config = one.config.model_copy(update={"run": run})
        write_text(folder / CONFIG, to_yaml(config))
        tags |= {"config_hash": config_hash(config), "git_commit": git_commit()}
    identify_run(folder, {name: str(value) for name, value in tags.items()})
    known = {
        (name, int(step)) for name, curve in read_metrics(folder).items() for step in curve.step
    }
    recorder = Recorder(folder)
    for record in _missing(one.records, known):
        recorder.record(record.step, record.images_seen, record.seconds, dict(record.values))
    status = "FAILED" if one.failed else "FINISHED"
    if last_status(folder).get("status") != status:
        recorder.note_end(status)
    recorder.close()
    return folder


def _missing(records: Iterable[Record], known: set[tuple[str, int]]) -> Iterable[Record]:
    for record in records:
        values = {
            name: value for name, value in record.values.items() if (name, record.step) not in known
        }
        if values:
            yield Record(record.step, record.images_seen, record.seconds, values)


def _note_artifacts(folder: Path, paths: Sequence[Path]) -> None:
    """The mirror sends files of the run folder only."""
    recorder = Recorder(folder)
    for path in paths:
        own = folder / "report" / path.name
        own.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, own)
        recorder.note_artifact(own, "report")
    recorder.close()


def git_commit() -> str:
    """The commit of this source tree; empty where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
