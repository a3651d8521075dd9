"""`dist-dml ui`: the MLflow UI on the runs of a folder."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from dist_dml.errors import UsageError
from dist_dml.tracking.destination import DATABASE

HOST = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dist-dml ui`."""
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--port", type=int, default=5000)


def run(arguments: argparse.Namespace) -> int:
    """Serve the UI on this machine alone, until Ctrl-C. Returns MLflow's exit code.

    Raises:
        UsageError: if there is no database, MLflow is not installed, or the port is taken.
    """
    command = ui_command(arguments.root, arguments.port)
    # The server starts others, which outlive it when it is killed: they get a session of their own,
    # that is ended as a whole.
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    print(
        # MLflow 3 opens on its pages for language models; the parameter asks for training runs.
        f"MLflow UI of {arguments.root}: "
        f"http://{HOST}:{arguments.port}/#/experiments?workflowType=machine_learning "
        "(there in about 10 s; Ctrl-C ends it)",
        flush=True,
    )
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(process)


def ui_command(root: Path, port: int) -> list[str]:
    """The command that serves the UI of `root`. Raises what `run` raises."""
    database = root / DATABASE
    if not database.is_file():
        raise UsageError(
            f"there is no MLflow database {database}; train first (tracking.mlflow=true), name the "
            "folder of the runs with --root, or fill it with `dist-dml track sync RUN_FOLDER`"
        )
    if importlib.util.find_spec("mlflow") is None:
        raise UsageError("mlflow is not installed; run `pip install 'dist_dml[mlflow]'`")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"port {port} cannot be used ({error}); give another with --port"
            ) from None
    command = [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{database.resolve()}"]
    return [*command, "--workers", "1", "--uvicorn-opts", "--log-level=warning"]


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and all that it has started, within 10 seconds."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
