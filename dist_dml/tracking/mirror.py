"""The trainer's side of the MLflow mirror: start a process, and in the end wait a bounded time.

Nothing of MLflow is imported here, no thread and no connection is opened: between the two calls the
mirror cannot reach the trainer at all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import dist_dml
from dist_dml.config import TrackingConfig
from dist_dml.tracking import run_files
from dist_dml.tracking.destination import Destination, destination_of

CHILD_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Mirror:
    """A mirror process that belongs to this trainer; `process` is None if it could not start.

    `log_start` is where this attempt's part of `mlflow.log` begins, in bytes.
    """

    folder: Path
    process: subprocess.Popen[bytes] | None
    log_start: int = 0

    def finish(self, timeout_seconds: float) -> str | None:
        """Wait until MLflow has everything, at most `timeout_seconds`. Leaves no process behind.

        Call it after `Recorder.note_end`, which is what the process waits for.

        Returns:
            None if MLflow has everything, else one sentence with the command that sends the rest.
        """
        code = None
        if self.process is not None:
            try:
                code = self.process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                _kill(self.process)
        if code == 0:
            return None
        return (
            f"MLflow does not have all of this run ({self._reason(timeout_seconds)}); nothing is "
            f"lost: `dist-dml track sync {self.folder}` sends the rest"
        )

    def _reason(self, timeout_seconds: float) -> str:
        try:
            log = (self.folder / run_files.MIRROR_LOG).read_bytes()[self.log_start :]
        except OSError:
            log = b""
        lines = log.decode(errors="replace").splitlines()
        return lines[-1][:160] if lines else f"no answer within {timeout_seconds:.0f} s"


def start_mirror(folder: Path, tracking: TrackingConfig, run_root: Path, run_name: str) -> Mirror:
    """Start the process that mirrors `folder` to MLflow. Returns at once (some milliseconds).

    It notes in the folder that the run is running; from here on the status of the run is whatever
    `Recorder.note_end` says, or KILLED if this process vanishes without a word.

    Raises:
        UsageError: if `tracking.mlflow_uri` is a folder.
    """
    destination = destination_of(tracking, run_root, run_name)
    try:
        run_files.identify_run(folder, {})
        attempt = run_files.start_attempt(folder)
        with (folder / run_files.MIRROR_LOG).open("ab") as log:
            log_start = log.tell()
            process = subprocess.Popen(
                _command(folder, destination, attempt, tracking.system_metrics),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                # Ctrl-C in the terminal reaches the trainer alone, which then ends the mirror.
                start_new_session=True,
            )
    except OSError as error:
        run_files.note_problem(folder, f"the mirror could not start: {error}")
        return Mirror(folder, None)
    return Mirror(folder, process, log_start)


def _command(
    folder: Path, destination: Destination, attempt: str, system_metrics: bool
) -> list[str]:
    command = [sys.executable, "-m", "dist_dml.tracking.mirror_process", str(folder.resolve())]
    # Everybody on the machine sees a command line. Secrets stand there as `${NAME}`, which the
    # process looks up in the environment that it inherits.
    command += ["--uri", destination.uri, "--experiment", destination.experiment]
    command += ["--run-name", destination.run_name]
    if destination.artifact_root is not None:
        command += ["--artifact-root", str(destination.artifact_root)]
    command += ["--attempt", attempt, "--parent-pid", str(os.getpid())]
    return command + (["--system-metrics"] if system_metrics else [])


def _environment() -> dict[str, str]:
    """The trainer's environment; values that the user has set for MLflow stay.

    The package's own folder goes first on the path, as `deepspeed dist_dml/train.py` runs it from
    a checkout that is not installed.
    """
    checkout = str(Path(dist_dml.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [checkout, os.environ.get("PYTHONPATH", "")]))
    return CHILD_ENVIRONMENT | os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it has started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
