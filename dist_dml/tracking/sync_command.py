"""`dist-dml track sync RUN_FOLDER ...`: send to MLflow what it does not have of runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dist_dml.credentials import redact, refuse_secret
from dist_dml.errors import RunError, UsageError
from dist_dml.tracking import run_files
from dist_dml.tracking.destination import destination_of, root_of, stored_config
from dist_dml.tracking.run_files import runs_below


def add_arguments(sync: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml track sync`."""
    sync.add_argument("folder", type=Path, nargs="+", metavar="RUN_FOLDER")
    sync.add_argument(
        "--recursive",
        action="store_true",
        help="also the runs in folders below: a study's trials, a protocol's folds",
    )
    sync.add_argument(
        "--uri",
        help="tracking server or database, secrets as ${NAME} (single quotes in a shell); default: "
        "the run's own config",
    )
    sync.add_argument("--experiment", help="default: the run's own config")
    sync.add_argument(
        "--status",
        choices=("FINISHED", "FAILED", "KILLED"),
        help="how a run ended that could not say so itself, as when its machine went down",
    )


def run(arguments: argparse.Namespace) -> int:
    """Replay each folder and say where it is now. May be repeated at any time.

    Raises:
        UsageError: for a folder that holds no run, or if MLflow is not installed.
        RunError: if the store does not answer. What it has taken until then is noted.
    """
    folders = arguments.folder
    if arguments.recursive:
        folders = runs_below(folders)
        if arguments.status is not None:
            raise UsageError("--status says how one run ended: leave --recursive out")
    for folder in folders:
        sync(folder, arguments.uri, arguments.experiment, arguments.status)
    return 0


def sync(folder: Path, uri: str | None, experiment: str | None, status: str | None) -> None:
    """Replay one run folder. None stands for what the run's config says. Errors as `run`."""
    if uri is not None:
        refuse_secret(uri, "--uri")
    config = stored_config(folder)
    tracking = config.tracking.model_copy(
        update={
            "mlflow_uri": config.tracking.mlflow_uri if uri is None else uri,
            "experiment": experiment or config.tracking.experiment,
        }
    )
    root = root_of(folder, config.run.name)
    destination = destination_of(tracking, root, config.run.name)
    if status is not None:
        _note_end(folder, status)
    # Before MLflow is imported, which reads them. A server that answers at all does so in 30 s.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    try:
        from dist_dml.tracking.mlflow_mirror import mirror_once

        run_id = mirror_once(folder, destination)
    except ImportError as error:
        extra = "postgresql" if error.name == "psycopg2" else "mlflow"
        raise UsageError(
            f"{error.name} is not installed; run `pip install 'dist_dml[{extra}]'`"
        ) from None
    except (UsageError, RunError):
        raise
    except Exception as error:
        # Redacted before it is cut: the first half of a password would not be known as one.
        reason = " ".join(redact(str(error)).split())[:300]
        raise RunError(
            f"MLflow at {destination.shown} did not take {folder} ({reason}); nothing is lost: "
            "repeat the command when it answers, or give another store with --uri"
        ) from None
    state = run_files.last_status(folder).get("status", "of unknown status")
    print(
        f"{folder} is in MLflow: {destination.shown}, experiment {destination.experiment!r}, "
        f"run {run_id}, {state}"
    )
    if state == "RUNNING":
        print("  if it no longer runs, say how it ended: --status KILLED")


def _note_end(folder: Path, status: str) -> None:
    from dist_dml.tracking.recorder import Recorder

    recorder = Recorder(folder)
    recorder.note_end(status)
    recorder.close()
